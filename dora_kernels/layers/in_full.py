"""Which modules train in full beside the adapters."""

from torch import nn

WRAPPED = ".modules_to_save"
"""What follows a module's path where PEFT trains a copy of the module."""


def trained_in_full(model: nn.Module) -> dict[str, int]:
    """How many parameters train, by the path of each outermost module all of whose own parameters do.

    A module that holds adapters is looked into, and a model without a frozen parameter has no such module.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        return {}
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        parameters = list(module.named_parameters())
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if not inside and parameters and all(_is_in_full(path, name, p) for name, p in parameters):
            found[path] = sum(parameter.numel() for _, parameter in parameters)
    return {path.partition(WRAPPED)[0]: size for path, size in found.items()}


def lines_in_full(trained: dict[str, int]) -> list[str]:
    """A line for each module of `trained_in_full`."""
    return [f"{path}: trained in full, {size} parameters" for path, size in trained.items()]


def _is_in_full(path: str, name: str, parameter: nn.Parameter) -> bool:
    parts = f"{path}.{name}".split(".")
    return parameter.requires_grad and not any(part.startswith("lora_") or part == "magnitude" for part in parts)
