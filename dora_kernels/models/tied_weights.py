"""Tied weights: a merged layer no longer equals its partner, so the model must be saved, and loaded again, untied."""

import warnings

from torch import nn

from ..layers.dora_layer import DoraLayer


def broken_ties(model: nn.Module) -> list[str]:
    """The tied parameters, by name, that merging separates from their source or that trained apart already."""
    broken = []
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        target_owner, source_owner = (model.get_submodule(name.rpartition(".")[0]) for name in (target, source))
        adapted = target.endswith(".weight") and any(isinstance(m, DoraLayer) for m in (target_owner, source_owner))
        if adapted or _parameter(model, target) is not _parameter(model, source):
            broken.append(target)
    return broken


def check_can_untie(model: nn.Module) -> None:
    """Refuses a model whose config cannot say that its weights are untied: it would be loaded tied again, and wrong.

    Raises:
        ValueError: T5's config, for one, sets `tie_word_embeddings` itself.
    """
    for config in _tied_configs(model):
        if type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False}).tie_word_embeddings:
            raise ValueError(
                f"Merging would untie {', '.join(broken_ties(model))}, and {type(config).__name__} cannot describe a "
                "model with untied weights: keep the adapter unmerged, or train it without these layers"
            )


def untie(model: nn.Module) -> dict:
    """Gives each tied parameter a copy of its own, and the config says so. Returns the arguments of `retie`."""
    configs, ties, copied = _tied_configs(model), model.all_tied_weights_keys, []
    for target, source in ties.items():
        parameter = _parameter(model, target)
        if parameter is _parameter(model, source):
            copied.append(target)
            _set_parameter(model, target, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    for config in configs:
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    warnings.warn(
        f"{', '.join(ties)} no longer tied after merging: set `tie_word_embeddings=False` in the model's config",
        stacklevel=3,
    )
    return {"configs": configs, "ties": ties, "copied": copied}


def retie(model: nn.Module, configs: list, ties: dict[str, str], copied: list[str]) -> None:
    """Undoes `untie`. The unmerged layers, with their weights, must be back."""
    for target in copied:
        _set_parameter(model, target, _parameter(model, ties[target]))
    for config in configs:
        config.tie_word_embeddings = True
    model.all_tied_weights_keys = ties


def _tied_configs(model: nn.Module) -> list:
    configs = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    return [config for config in configs.values() if getattr(config, "tie_word_embeddings", False)]


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)
