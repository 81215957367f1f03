"""What a call inside activation checkpointing keeps for, and takes from, the recomputation of its forward.

Known of non-reentrant checkpointing alone, whose hooks on saved tensors say in which of the two a call is: those of the
forward drop what is saved, those of the recomputation hold it until the backward.
"""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .accumulation import keep_norm, keeps_weight
from .call import Call, Inputs
from .checkpointing import checkpoint_hook, is_saved_elsewhere, is_selective
from .output import OutputUse
from .types import NormScale

MOST_KEPT = 2 << 30
"""Bytes of W' that one checkpointed region may hold from its recomputation to its backward: those of a decoder layer of
70 billion parameters, but not those of a model that is one region."""

_kept: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # bytes by region, which its hook stands for


def keeps_merged(weight: torch.Tensor, use: OutputUse | None = None) -> bool:
    """Whether W' should be saved for the backward, which else merges again: it is bit for bit the same.

    Forward and recomputation of a region, whose calls come in one order, get the same answers. What is kept anyhow for
    the calls of a scope, by layers whose first has this `use`, is saved unless hooks would copy it for each of them.
    """
    if keeps_weight(use):
        return not is_saved_elsewhere()
    hook = checkpoint_hook()
    if hook is None:
        return False
    kept = _kept.get(hook, 0) + weight.nbytes
    if kept > MOST_KEPT:
        return False
    _kept[hook] = kept
    return True


class LastNorm(NamedTuple):
    """n and g of a layer's last checkpointed forward, and the factors that they are of."""

    factors: tuple[weakref.ref, ...]
    scaling: float
    norm_scale: NormScale


def remember_norm(use: OutputUse | None, factors: Sequence[torch.Tensor], scaling: float, found: NormScale) -> None:
    """Keeps n and g for the recomputation of this forward, if one will follow."""
    hook = checkpoint_hook()
    if use is not None and hook is not None and not _recomputes(hook):
        use.last_norm = LastNorm(tuple(map(weakref.ref, factors)), scaling, found)


def leave_norm(call: Call, inputs: Inputs, found: NormScale) -> None:
    """Leaves n and g of a call of `forms` to its recomputation, and to later calls inside `accumulating`."""
    factors = inputs.lora_A, inputs.lora_B, inputs.magnitude
    remember_norm(call.output_use, factors, call.scaling, found)
    if inputs.given is None and call.trains:
        keep_norm(call.output_use, factors, call.scaling, found)


def remembered_norm(use: OutputUse | None, factors: Sequence[torch.Tensor], scaling: float) -> NormScale | None:
    """n and g of the forward that is being recomputed; None where the call is no recomputation, or of other factors.

    Bit for bit what would be computed: a change of the factors in between has spoiled the recomputation by itself.
    """
    hook = checkpoint_hook()
    if use is None or use.last_norm is None or hook is None or not _recomputes(hook) or is_selective():
        return None
    last = use.last_norm
    use.last_norm = None  # taken: nothing is held from step to step
    same = last.scaling == scaling and all(ref() is factor for ref, factor in zip(last.factors, factors))
    return last.norm_scale if same else None


def _recomputes(hook) -> bool:
    return hook.__qualname__.startswith("_recomputation_hook")
