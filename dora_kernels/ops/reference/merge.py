"""W' = g ⊙ (W + s B A), rounded once."""

import torch

from ..base_weights import Packed, stored_rounding
from ..chunked import chunk_buffer, row_chunks
from ..types import NormScale, Rounding
from .cast import scaled_cast
from .rounding import round_to
from .weight_norm import accumulate_dtype, adapted_rows, row_norm, scale_of


def merge(
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor | None,
    scaling: float,
    *,
    dtype: torch.dtype,
    rounding: Rounding,
    norm_scale: NormScale | None = None,
    out: torch.Tensor | None = None,
    into: NormScale | None = None,
    A_into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, NormScale]:
    """W' [N, K] in `dtype`, and n and g.

    With `norm_scale` given the norm is not computed again, and `magnitude` is not read: the backward's merge, or a
    frozen adapter's. `out` [N, K], contiguous, takes W', `into` n and g, and `A_into` [R, K] A in its dtype.
    """
    if A_into is not None:
        A_into.copy_(scaled_cast(lora_A, A_into.dtype, rounding=rounding))
    given = norm_scale is not None
    acc_dtype = norm_scale.scale.dtype if given else accumulate_dtype(weight, lora_A, lora_B, magnitude)
    merged = torch.empty(weight.shape, dtype=dtype, device=weight.device) if out is None else out
    if not given:
        norm = torch.empty(weight.shape[0], dtype=acc_dtype, device=weight.device)
        norm_scale = NormScale(norm, torch.empty_like(norm)) if into is None else into
    norm, scale = norm_scale
    stored = rounding._replace(mode=stored_rounding(weight, rounding.mode))
    buffer = chunk_buffer(*weight.shape, acc_dtype, weight.device)
    wide = None if given else chunk_buffer(*weight.shape, torch.float64, weight.device)
    for rows in row_chunks(*weight.shape):
        adapted = adapted_rows(weight, lora_A, lora_B, scaling, rows, buffer)
        if not given:
            norm[rows] = row_norm(adapted, wide)
            scale[rows] = scale_of(magnitude[rows], norm[rows])
        merged[rows] = round_to(adapted.mul_(scale[rows, None]), dtype, stored, rows.start)
    return merged, norm_scale
