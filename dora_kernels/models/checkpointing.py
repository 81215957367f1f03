"""Reentrant activation checkpointing: a module whose input has no gradient would get none for its parameters either.

transformers gives the embeddings' output a gradient. A vision tower's first layer has no embeddings before it.
"""

import torch
from torch import nn

from ..layers.linear import DoraLinear


def pass_gradients(model: nn.Module) -> None:
    """Lets each checkpointed module with a DoRA layer inside give its input a gradient."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing") and any(isinstance(part, DoraLinear) for part in module.modules()):
            module.register_forward_pre_hook(give_gradient)


def give_gradient(module: nn.Module, args: tuple) -> tuple | None:
    """The arguments, the first with a gradient, where `module` recomputes its forward in the reentrant way."""
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    is_reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", False)
    if not (module.gradient_checkpointing and module.training and is_reentrant and torch.is_grad_enabled()):
        return None
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    if not tensors or not tensors[0].is_floating_point() or any(tensor.requires_grad for tensor in tensors):
        return None
    return tuple(value.detach().requires_grad_() if value is tensors[0] else value for value in args)
