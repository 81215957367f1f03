"""n and g that a layer keeps over the micro-steps of one optimizer step, inside `accumulating`.

Whether A, B and m are still those of which they are is asked of their content, on their device, at each call: version
counters miss half of the ways to change a tensor, and the host never waits for the answer. W is not asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from .base_weights import Weight, readable
from .checkpointing import is_selective
from .output import OutputUse
from .types import KeptNorm, NormScale


@dataclass
class Kept:
    """What a layer keeps, and how often it was compared with the layer's factors."""

    scaling: float
    norm: KeptNorm
    comparisons: int = 0
    changed: torch.Tensor | None = None  # what the last comparison found


def kept_norm(
    ops: ModuleType,
    use: OutputUse | None,
    weight: Weight,
    factors: Sequence[torch.Tensor],
    scaling: float,
    into: NormScale | None = None,
) -> NormScale | None:
    """n and g of these factors, kept or computed anew, in fresh memory or in `into`; None outside the scope, in its
    first call, where the dtypes or the device are others by now, and inside a compiled graph."""
    if not is_kept(use) or use.kept_norm is None:
        return None
    kept: Kept = use.kept_norm
    if kept.scaling != scaling or not all(map(_fits, kept.norm.factors, factors)):
        return None
    kept.comparisons += 1
    with torch.no_grad():
        found, kept.changed = ops.kept_norm(readable(weight), *factors, scaling, kept.norm, into=into)
    return found


def keep_norm(use: OutputUse | None, factors: Sequence[torch.Tensor], scaling: float, found: NormScale) -> None:
    """Keeps what a call computed for the next one, inside the scope."""
    if not is_kept(use):
        return
    # Outside inference mode, which else forbids a later call to write into what is kept here.
    with torch.inference_mode(False), torch.no_grad():
        copies = [factor.detach().clone(memory_format=torch.contiguous_format) for factor in factors]
        use.kept_norm = Kept(scaling, KeptNorm(*copies, NormScale(*(part.detach().clone() for part in found))))


def is_kept(use: OutputUse | None) -> bool:
    """Whether a call of the layer keeps what it computes: not where forward and recomputation must run the same."""
    return use is not None and not torch.compiler.is_compiling() and use.keeps_norm and not is_selective()


def keeps_weight(use: OutputUse | None) -> bool:
    """Whether it keeps W' there too."""
    return is_kept(use) and use.keeps_weight


def _fits(kept: torch.Tensor, factor: torch.Tensor) -> bool:
    return kept.shape == factor.shape and kept.dtype == factor.dtype and kept.device == factor.device
