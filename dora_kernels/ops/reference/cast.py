"""Small factors in the compute dtype: A for h = x Aᵀ, and s B or s g ⊙ B for dh."""

import torch

from ..types import Rounding
from .rounding import round_to


def scaled_cast(
    factor: torch.Tensor,
    dtype: torch.dtype,
    *,
    scale: torch.Tensor | None = None,
    scaling: float = 1.0,
    rounding: Rounding,
) -> torch.Tensor:
    """`scaling` · `scale` ⊙ `factor` [rows, columns] as `dtype`, `scale` [rows] or 1; in fp32, rounded once."""
    acc_dtype = torch.float64 if torch.float64 in (factor.dtype, dtype) else torch.float32
    product = factor.to(acc_dtype) * (scaling if scale is None else (scale.to(acc_dtype) * scaling)[:, None])
    return round_to(product, dtype, rounding)
