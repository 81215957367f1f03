"""Finds the module or the parameter where NaN or infinity first appears."""

from collections.abc import Callable

import torch
from torch import nn

from ..distributed.sharding import full_tensor


@torch.no_grad()
def first_nonfinite(model: nn.Module, forward: Callable[[], object]) -> str:
    """Run `forward` again; a sentence that names the first module of `model` to return NaN or infinity."""
    first: list[str] = []

    def recorder(name: str):
        def hook(module, inputs, output):
            if not first and any(_not_finite(tensor) for tensor in _tensors(output)):
                first.append(name)

        return hook

    hooks = [module.register_forward_hook(recorder(name)) for name, module in model.named_modules() if name]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    # Before any return: gathering a sharded model's parameters is collective.
    broken = [name for name, parameter in model.named_parameters() if _not_finite(parameter)]
    if not first:
        return "every layer's output was finite when the batch was run again"
    parameter = f" (the parameter {broken[0]} holds NaN or infinity)" if broken else ""
    return f"{first[0]} was the first layer to go{parameter}"


def first_nonfinite_gradient(model: nn.Module) -> str:
    """The name of the first parameter whose gradient holds NaN or infinity."""
    gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return next((name for name, grad in gradients if grad is not None and _not_finite(grad)), "no parameter's")


def _tensors(output) -> list[torch.Tensor]:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _not_finite(tensor: torch.Tensor) -> bool:
    # A quantised weight holds integers, which are finite.
    return tensor.is_floating_point() and not bool(torch.isfinite(full_tensor(tensor)).all())
