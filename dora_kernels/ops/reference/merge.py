"""W' = g ⊙ (W + s B A), rounded once."""

import torch

from ..base_weights import Nf4Weight, stored_rounding
from ..chunked import chunk_buffer, row_chunks
from .rounding import round_to
from .weight_norm import accumulate_dtype, adapted_rows, norm_scale, row_norm


def merge(
    weight: torch.Tensor | Nf4Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor | None,
    scaling: float,
    *,
    dtype: torch.dtype,
    rounding: str,
    salt: int,
    weight_norm: torch.Tensor | None = None,
    mag_norm_scale: torch.Tensor | None = None,
    cast_A: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W' [N, K] in `dtype`, n [N] and g [N].

    With `weight_norm` and `mag_norm_scale` given (both or neither) the norm is not computed again and `magnitude` is
    not read: the backward's merge, or a frozen adapter's. Else `cast_A` [R, K], contiguous, receives A rounded to its
    dtype: the norm reads A anyway.
    """
    given = mag_norm_scale is not None
    acc_dtype = mag_norm_scale.dtype if given else accumulate_dtype(weight, lora_A, lora_B, magnitude)
    merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    norm = weight_norm if given else torch.empty(weight.shape[0], dtype=acc_dtype, device=weight.device)
    scale = mag_norm_scale if given else torch.empty_like(norm)
    stored = stored_rounding(weight, rounding)
    buffer = chunk_buffer(*weight.shape, acc_dtype, weight.device)
    wide = None if given else chunk_buffer(*weight.shape, torch.float64, weight.device)
    for rows in row_chunks(*weight.shape):
        adapted = adapted_rows(weight, lora_A, lora_B, scaling, rows, buffer)
        if not given:
            norm[rows] = row_norm(adapted, wide)
            scale[rows] = norm_scale(magnitude[rows], norm[rows])
        merged[rows] = round_to(adapted.mul_(scale[rows, None]), dtype, stored, salt, rows.start)
    if cast_A is not None:
        cast_A.copy_(round_to(lora_A.to(acc_dtype), cast_A.dtype, rounding, salt))
    return merged, norm, scale
