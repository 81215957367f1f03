"""Gradient accumulation: n and g are computed once for an optimizer step, not once for each of its micro-steps."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..ops.output import OutputUse
from . import Model
from .frozen import Freezable


def norm_uses(model: Model) -> list[OutputUse]:
    """The memories of the layers of `model` that can keep n and g."""
    layers = (module for module in model.modules() if isinstance(module, Freezable))
    return [layer.output_use for layer in layers if hasattr(layer, "output_use")]


@contextmanager
def accumulating(model: Model) -> Iterator[Model]:
    """Inside the scope every linear DoRA layer of `model`, ours or patched, keeps n and g from one training call to the
    next, for as long as A, B and m hold the same bits. Leaving it forgets them.

    Each call compares A, B and m with a copy of them on their own device, whichever way they were changed, and computes
    n and g anew where a bit differs: results are those without the scope, bit for bit, except in weight space in
    Triton, where W' may add B A's fp32 products in another order. It costs a copy of A, B and m, and pays with two or
    more micro-steps to an optimizer step. W is not compared: it is frozen, and loading into it raises inside the scope.

    Embeddings, convolutions, experts, compiled graphs, and layers that run alone and without gradients in eval mode
    compute n at each call, inside the scope too.

    Raises:
        ValueError: no such layer in the model. RuntimeError: the scope is open for it already; or, inside, frozen
            weights are loaded.
    """
    uses = norm_uses(model)
    if not uses:
        raise ValueError(
            "accumulating found no DoRA layer of this engine: call apply_dora first, or patch_peft on a PEFT model"
        )
    if any(use.keeps_norm for use in uses):
        raise RuntimeError("accumulating is open for these layers already: it does not nest")
    try:
        for use in uses:
            use.keeps_norm = True
        yield model
    finally:
        for use in uses:
            use.keeps_norm, use.kept_norm = False, None
