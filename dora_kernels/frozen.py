"""Inference without merging: g once per layer, so that decoding reads W once per token instead of twice."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .linear import DoraLinear


@contextmanager
def frozen_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the scope every `DoraLinear` of `model` keeps n and g; leaving it forgets them.

    The model must be in eval mode, and forward must run without gradients: `model.train()`, loading weights and a
    forward that autograd would record raise inside the scope. Weights changed in place by other means are not seen.

    Raises:
        ValueError: no `DoraLinear` in the model. RuntimeError: the model is in training mode, or frozen already.
    """
    layers = [module for module in model.modules() if isinstance(module, DoraLinear)]
    if not layers:
        raise ValueError("frozen_adapters found no DoraLinear in the model; call apply_dora first")
    if any(layer.training for layer in layers):
        raise RuntimeError("frozen_adapters is for inference: call model.eval() first")
    if any(layer.frozen_scale is not None for layer in layers):
        raise RuntimeError("the adapters are frozen already: frozen_adapters does not nest")
    try:
        for layer in layers:
            layer.frozen_scale = layer.weight_norm()
        yield model
    finally:
        for layer in layers:
            layer.frozen_scale = None
