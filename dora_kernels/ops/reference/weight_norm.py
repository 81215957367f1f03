"""Norm of V = W + s B A per output feature, and g = m / n."""

import torch

from ..base_weights import Packed
from ..chunked import chunk_buffer, row_chunks
from ..types import NEAREST, NormScale, Rounding
from .base_weight import weight_rows
from .rounding import round_to


def accumulate_dtype(*tensors: torch.Tensor | Packed) -> torch.dtype:
    """fp64 where an input is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def scale_of(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """g [N] = sign(m) · max(|m| / n, 2⁻⁴⁰) with sign(0) = +1; 0 where n is below the smallest normal number.

    The floor keeps y = g ⊙ (…) invertible, so that dm can be read off y at m = 0 too. Where V is zero the output
    feature is its bias alone and no gradient passes; a NaN norm stays NaN.
    """
    magnitude = magnitude.to(norm.dtype)
    # clamp_min keeps a NaN ratio NaN. A literal: `torch.compile(dynamic=True)` makes a symbol of a module's number in
    # the first function that reads it, and fails in the second.
    ratio = (magnitude.abs() / norm).clamp_min(2.0**-40)
    signed = torch.where(magnitude < 0, -ratio, ratio)
    return torch.where(norm < torch.finfo(norm.dtype).tiny, torch.zeros_like(signed), signed)


def adapted_rows(
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    rows: slice,
    buffer: torch.Tensor,
) -> torch.Tensor:
    """V[rows] = W[rows] + s B[rows] A, [rows, K], written to the head of `buffer`, in its dtype."""
    dtype = buffer.dtype
    adapted = buffer[: rows.stop - rows.start].copy_(weight_rows(weight, rows, dtype))
    return adapted.addmm_(lora_B[rows].to(dtype), lora_A.to(dtype), alpha=scaling)


def row_norm(adapted: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """‖·‖₂ over the last dimension, summed in fp64, in the buffer `wide`: squares of any fp32 number fit."""
    return torch.linalg.vector_norm(wide[: adapted.shape[0]].copy_(adapted), dim=1).to(adapted.dtype)


def weight_norm(
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    *,
    A_dtype: torch.dtype | None = None,
    rounding: Rounding = NEAREST,
    into: NormScale | None = None,
    A_into: torch.Tensor | None = None,
) -> tuple[NormScale, torch.Tensor | None]:
    """n and g of W [N, K], A [R, K], B [N, R], m [N]; and A [R, K] in `A_dtype`, None where none is asked.

    The norm reads A anyway: its copy costs one store. `rounding` is the copy's. `into` and `A_into` take the results,
    in memory that the caller has.
    """
    dtype = accumulate_dtype(weight, lora_A, lora_B, magnitude)
    norm = torch.empty(weight.shape[0], dtype=dtype, device=weight.device) if into is None else into.norm
    buffer, wide = (chunk_buffer(*weight.shape, each, weight.device) for each in (dtype, torch.float64))
    for rows in row_chunks(*weight.shape):
        norm[rows] = row_norm(adapted_rows(weight, lora_A, lora_B, scaling, rows, buffer), wide)
    norm_scale = NormScale(norm, scale_of(magnitude, norm))
    if into is not None:
        into.scale.copy_(norm_scale.scale)
        norm_scale = into
    cast_A = None if A_dtype is None else round_to(lora_A.to(dtype), A_dtype, rounding)
    return norm_scale, cast_A if A_into is None else A_into.copy_(cast_A)
