"""W' as it was kept, where A, B and m are bit for bit those that it is of."""

import torch

from ..base_weights import Packed
from ..types import NormScale, Rounding
from .merge import merge


def kept_merge(
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    *,
    rounding: Rounding,
    norm_scale: NormScale,
    changed: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Leaves W' [N, K] in `out` where `changed`, as `kept_norm` returns it, says that nothing did. Else merges W
    [N, K], A [R, K], B [N, R] and g anew into it, in its dtype."""
    # A device is not waited for: there, W' is merged in any case.
    if weight.device.type != "cpu" or changed.any():
        merge(weight, lora_A, lora_B, None, scaling, dtype=out.dtype, rounding=rounding, norm_scale=norm_scale, out=out)
