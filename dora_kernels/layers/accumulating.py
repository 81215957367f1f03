"""Gradient accumulation: n and g, on request W' too, are made once for an optimizer step, not for each micro-step."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..config import check_bools
from ..ops.output import OutputUse
from . import Model
from .frozen import Freezable


def norm_uses(model: Model) -> list[OutputUse]:
    """The memories of the layers of `model` that can keep n and g."""
    layers = (module for module in model.modules() if isinstance(module, Freezable))
    return [layer.output_use for layer in layers if hasattr(layer, "output_use")]


@contextmanager
def accumulating(model: Model, *, keep_weights: bool = False) -> Iterator[Model]:
    """Inside the scope the DoRA layers of `model`, ours or patched, keep n and g from one training call to the next,
    for as long as A, B and m hold the same bits. Leaving it forgets them.

    Each call compares A, B and m with a copy of them on their own device, whichever way they were changed, and computes
    n and g anew where a bit differs: results are those without the scope, bit for bit, except in weight space in
    Triton, where W' may add B A's fp32 products in another order. It costs a copy of A, B and m, and pays with two or
    more micro-steps to an optimizer step. W is not compared: it is frozen, and loading into it raises inside the scope.

    With `keep_weights` linear layers and convolutions that run in weight space keep W' too, in their input's dtype: two
    merges less in each micro-step, for memory of the size of the adapted weights in that dtype. While a graph still
    holds it, as between two forwards and their backwards, a forward makes one of its own. Token space has no W'.

    Experts, `merge_aware` layers, convolutions in token space, compiled graphs, regions of selective checkpointing, and
    layers that run alone and without gradients in eval mode compute n at each call, inside the scope too. `explain`
    says what a layer keeps. Backward passes belong inside the scope.

    Raises:
        ValueError: no such layer in the model. TypeError: `keep_weights` is no bool. RuntimeError: the scope is open
            for it already; or, inside, frozen weights are loaded.
    """
    check_bools(keep_weights=keep_weights)
    uses = norm_uses(model)
    if not uses:
        raise ValueError(
            "accumulating found no DoRA layer of this engine: call apply_dora first, or patch_peft on a PEFT model"
        )
    if any(use.keeps_norm for use in uses):
        raise RuntimeError("accumulating is open for these layers already: it does not nest")
    try:
        for use in uses:
            use.keeps_norm, use.keeps_weight = True, keep_weights
        yield model
    finally:
        for use in uses:
            use.keeps_norm = use.keeps_weight = False
            use.forget()
