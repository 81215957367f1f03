"""Which modules a config means. The matching is PEFT's, to the letter; PEFT itself is not needed."""

import re

from torch import nn

from ..config import DoraConfig
from ..layers.support import LINEAR_CLASSES
from ..ops.base_weights import is_quantized
from .modules import listed


def find_targets(model: nn.Module, config: DoraConfig) -> dict[str, nn.Module]:
    """The modules to adapt, by path, in the model's order.

    Raises:
        ValueError: nothing matches, an entry of `target_modules` matches nothing, or all that matches is excluded.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if is_all_linear(config.target_modules):
        head = output_embeddings(model)
        matched = [name for name, m in modules.items() if _is_linear(m) and m is not head]
        absent = []
    else:
        matched = [name for name in modules if matches(config.target_modules, name)]
        absent = unmatched(model, config.target_modules)
    if absent or not matched:
        linear = sorted({name.rpartition(".")[2] for name, m in modules.items() if _is_linear(m)})
        # An adapter of another model names hundreds.
        wanted = config.target_modules if isinstance(config.target_modules, str) else f"[{listed(map(repr, absent))}]"
        raise ValueError(
            f"Target modules {wanted} not found in the base model. Please check the target modules and try again. Its "
            f"linear layers are named: {', '.join(linear) or 'it has none'}"
        )
    targets = {name: modules[name] for name in matched if not is_excluded(config, name)}
    if not targets:
        raise ValueError(
            "All modules were excluded. Check your `target_modules`, `exclude_modules` and `modules_to_save` "
            f"configuration: {len(matched)} modules match, the first is {matched[0]!r}"
        )
    return targets


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, LINEAR_CLASSES) or is_quantized(module)


def find_saved(model: nn.Module, config: DoraConfig) -> dict[str, nn.Module]:
    """The modules of `modules_to_save`, by path: whose name ends with an entry (as in PEFT: no dot needed)."""
    saved = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{path}.") for path in saved)
        if name and not inside and any(name.endswith(entry) for entry in config.modules_to_save or ()):
            saved[name] = module
    return saved


def is_excluded(config: DoraConfig, name: str) -> bool:
    """Whether `exclude_modules` names it, or it is or lies inside one of `modules_to_save`."""
    if config.exclude_modules and matches(config.exclude_modules, name):
        return True
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in config.modules_to_save or ())


def is_all_linear(target_modules: list[str] | str) -> bool:
    return isinstance(target_modules, str) and target_modules.lower() == "all-linear"


def unmatched(model: nn.Module, entries: list[str] | str) -> list[str]:
    """The names of a list, or the regular expression, that no module of the model matches."""
    names = [name for name, _ in model.named_modules()]
    each = [(entries, entries)] if isinstance(entries, str) else [([entry], entry) for entry in entries]
    return [entry for single, entry in each if not any(matches(single, name) for name in names)]


def idle_exclusions(model: nn.Module, config: DoraConfig) -> str:
    """A sentence on the entries of `exclude_modules` that match nothing, or "". No error, as in PEFT: one config may
    serve several models."""
    idle = listed(map(repr, unmatched(model, config.exclude_modules or [])))
    return f"`exclude_modules` [{idle}] matches no module of the model: it excludes nothing" if idle else ""


def rank_and_alpha(config: DoraConfig, name: str, r: int | None = None) -> tuple[int, float]:
    """`r` and `lora_alpha` of the module called `name`. An `r` that is given stands for the config's own."""
    r = _lookup(config.rank_pattern, name, config.r if r is None else r)
    return r, _lookup(config.alpha_pattern, name, config.lora_alpha)


def check_patterns(config: DoraConfig, targets: dict, stacks: dict[str, tuple[nn.Module, list[str]]]) -> None:
    """Raises ValueError for a key of `rank_pattern` or `alpha_pattern` that means none of the layers `targets`, nor of
    the experts' parameters, both by path."""
    names = [*targets, *(f"{path}.{name}".strip(".") for path, (_, own) in stacks.items() for name in own)]
    for field in ("rank_pattern", "alpha_pattern"):
        idle = [key for key in getattr(config, field) or {} if not any(_means(key, name) for name in names)]
        if idle:
            raise ValueError(
                f"`{field}` [{listed(map(repr, idle))}] matches no layer that is adapted: the end of its name, or a "
                f"regular expression for it. The first of these layers is {names[0]}"
            )


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The language-model head, for a Hugging Face model that has one."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def matches(names: list[str] | str, name: str) -> bool:
    """Whether a list of names or suffixes, or a regular expression for the whole, means the module called `name`."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return name in names or any(name.endswith(f".{entry}") for entry in names)


def _lookup(pattern: dict | None, name: str, default):
    """The value of the first key that matches the end of `name`, as `peft.utils.other.get_pattern_key` finds it."""
    for key, value in (pattern or {}).items():
        if _means(key, name):
            return value
    return (pattern or {}).get(name, default)


def _means(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None
