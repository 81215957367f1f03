"""Inference without merging: g once per layer, so that decoding reads W once per token instead of twice."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .freezable import Freezable


@contextmanager
def frozen_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the scope every DoRA layer of `model`, ours or patched, keeps n and g; leaving it forgets them.

    The model must be in eval mode, and forward must run without gradients: `model.train()`, loading weights, merging,
    unpatching and a forward that autograd would record raise inside the scope. Weights changed in place by other means
    are not seen. A patched PEFT layer keeps them for the adapter that is active on entering; any other is computed as
    ever, and what is left to PEFT stays so. Outputs are the same to the last bit, but for weight space in Triton: there
    another kernel computes W', and may add B A's fp32 products in another order.

    Raises:
        ValueError: no such layer in the model, or weights that are offloaded or sharded. RuntimeError: the model is in
            training mode, or frozen already.
    """
    layers = [module for module in model.modules() if isinstance(module, Freezable)]
    if not layers:
        raise ValueError(
            "frozen_adapters found no DoRA layer of this engine: call apply_dora first, or patch_peft on a PEFT model"
        )
    if any(layer.training for layer in layers):
        raise RuntimeError("frozen_adapters is for inference: call model.eval() first")
    if any(layer.frozen_scale is not None for layer in layers):
        raise RuntimeError("the adapters are frozen already: frozen_adapters does not nest")
    try:
        for layer in layers:
            layer.freeze()
        yield model
    finally:
        for layer in layers:
            layer.thaw()
