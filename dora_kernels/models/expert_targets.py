"""Which fused parameters, stacks of experts, a config means. The matching is PEFT's: a name, or the end of one."""

from torch import nn

from ..config import DoraConfig
from ..layers.expert_stacks import STACKS, experts_per_token, parameter_names, why_not_experts
from .modules import listed
from .targets import rank_and_alpha


def check_parameters(model: nn.Module, config: DoraConfig) -> dict[str, tuple[nn.Module, list[str]]]:
    """The experts' modules whose parameters `target_parameters` means, by path, with the parameters' names in order.

    Raises:
        ValueError: an entry that matches nothing, a parameter that cannot be adapted (each is named), or an option that
            stacks of experts do not have.
    """
    if not config.target_parameters:
        return {}
    found, reasons, matched = {}, set(), set()
    for path, module in model.named_modules():
        for name in parameter_names(module):
            full = f"{path}.{name}".strip(".")
            if entries := {entry for entry in config.target_parameters if f".{full}".endswith(f".{entry}")}:
                matched |= entries
                found.setdefault(path, (module, []))[1].append(name)
                if reason := why_not_experts(module, name):
                    reasons.add(f"{full} {reason}")
    if unmatched := set(config.target_parameters) - matched:
        raise ValueError(
            f"Target parameters {sorted(unmatched)} not found in the base model. Its stacks of experts: "
            f"{listed(_stacks(model)) or 'it has none'}"
        )
    if reasons:
        raise ValueError(f"Target parameters that cannot be adapted: {listed(reasons, '; ')}")
    for path, (experts, names) in found.items():
        for name in names:
            if expert_rank_and_alpha(config, f"{path}.{name}", experts)[0] < 1:
                raise ValueError(
                    '`r` should be at least the number of experts of a token with `expert_rank="active"`: '
                    f"{path}.{name} has r={config.r} and num_experts_per_tok={experts_per_token(experts)}; raise `r`, "
                    "or name the rank in `rank_pattern`"
                )
    if config.lora_dropout > 0:
        raise ValueError("`lora_dropout` should be 0 with `target_parameters`: stacks of experts have no dropout")
    return found


def expert_rank_and_alpha(config: DoraConfig, name: str, experts: nn.Module) -> tuple[int, float]:
    """The rank and `lora_alpha` of each expert of the stack called `name` in the module `experts`.

    Dividing the rank over a token's experts is "LoRA Without Regret"'s advice, NeMo AutoModel's `moe_rank_scaling` and
    Megatron Bridge's `normalize_moe_lora`. A rank in `rank_pattern` is not divided.
    """
    if config.expert_rank == "full":
        return rank_and_alpha(config, name)
    chosen = experts_per_token(experts)
    return rank_and_alpha(config, name, config.r // chosen if chosen else 0)


def how_to_adapt(model: nn.Module) -> str:
    """How the experts that "all-linear" leaves out are adapted, or why they cannot be."""
    stacks = _stacks(model)
    if able := sorted({".".join(path.split(".")[-3:]) for path, reason in stacks.items() if reason is None}):
        return f"target_parameters={able} adapts them"
    return f"{next(f'{path} {reason}' for path, reason in stacks.items())}" if stacks else "they are of no known kind"


def _stacks(model: nn.Module) -> dict[str, str | None]:
    """The fused parameters by name, and why each cannot be adapted."""
    return {
        f"{path}.{name}".strip("."): why_not_experts(module, name)
        for path, module in model.named_modules()
        for name in parameter_names(module)
        if name in STACKS and getattr(module._parameters.get(name), "ndim", 3) == 3
    }
