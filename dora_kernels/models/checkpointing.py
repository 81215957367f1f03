"""Reentrant activation checkpointing: layers whose input has no gradient would get none for their parameters either.

transformers gives the embeddings' output a gradient. The first layer of a vision tower has no embeddings before it.
"""

import torch
from torch import nn

from ..layers.dora_layer import DoraLayer
from ..layers.experts import DoraExperts


def pass_gradients(model: nn.Module) -> None:
    """Lets each module that holds a list of checkpointed layers, with DoRA layers inside, give its input a gradient."""
    for module in model.modules():
        layers = [layer for layer in _layers(module) if hasattr(layer, "gradient_checkpointing")]
        if any(isinstance(part, (DoraLayer, DoraExperts)) for layer in layers for part in layer.modules()):
            module.register_forward_pre_hook(give_gradient, with_kwargs=True)


def give_gradient(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The arguments, the first tensor of numbers with a gradient, where the layers run their forward again in the
    reentrant way."""
    if not (module.training and torch.is_grad_enabled() and any(map(_is_reentrant, _layers(module)))):
        return None
    given = [*args, *(value for name, value in kwargs.items() if "mask" not in name)]
    tensors = [value for value in given if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if not tensors or any(tensor.requires_grad for tensor in tensors):
        return None
    leaf = tensors[0].detach().requires_grad_()
    args = tuple(leaf if value is tensors[0] else value for value in args)
    return args, {name: leaf if value is tensors[0] else value for name, value in kwargs.items()}


def _layers(module: nn.Module) -> list[nn.Module]:
    return [layer for child in module.children() if isinstance(child, nn.ModuleList) for layer in child]


def _is_reentrant(layer: nn.Module) -> bool:
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    options = getattr(checkpoint, "keywords", {})
    return getattr(layer, "gradient_checkpointing", False) and options.get("use_reentrant", False)
