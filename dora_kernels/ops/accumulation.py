"""n and g that a layer keeps over the micro-steps of one optimizer step, inside `accumulating`.

Whether A, B and m are still those of which they are is asked of their content, on their device, at each call: version
counters miss half of the ways to change a tensor, and the host never waits for the answer. W is not asked.
"""

from collections.abc import Sequence
from types import ModuleType

import torch

from .base_weights import Weight, readable
from .output import OutputUse
from .types import KeptNorm, NormScale


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
    if not _keeps(use) or use.kept_norm is None:
        return None
    kept_scaling, kept = use.kept_norm
    if kept_scaling != scaling or not all(map(_fits, kept.factors, factors)):
        return None
    with torch.no_grad():
        return ops.kept_norm(readable(weight), *factors, scaling, kept, into=into)


def keep_norm(use: OutputUse | None, factors: Sequence[torch.Tensor], scaling: float, found: NormScale) -> None:
    """Keeps what a call computed for the next one, inside the scope."""
    if not _keeps(use):
        return
    # Outside inference mode, which else forbids a later call to write into what is kept here.
    with torch.inference_mode(False), torch.no_grad():
        copies = [factor.detach().clone(memory_format=torch.contiguous_format) for factor in factors]
        use.kept_norm = scaling, KeptNorm(*copies, NormScale(*(part.detach().clone() for part in found)))


def _keeps(use: OutputUse | None) -> bool:
    return use is not None and not torch.compiler.is_compiling() and use.keeps_norm


def _fits(kept: torch.Tensor, factor: torch.Tensor) -> bool:
    return kept.shape == factor.shape and kept.dtype == factor.dtype and kept.device == factor.device
