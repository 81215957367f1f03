"""Small factors in the compute dtype: A for h = x Aᵀ, and s B or s g ⊙ B for dh."""

import torch

from ..types import Rounding
from .rounding import round_to


def scaled_cast(
    factor: torch.Tensor,
    dtype: torch.dtype,
    *,
    scale: torch.Tensor | None = None,
    scaling: float | None = None,
    rounding: Rounding,
) -> torch.Tensor:
    """`scaling` · `scale` ⊙ `factor` [rows, columns] as `dtype`; in fp32, rounded once. `scale` [rows] comes with a
    `scaling`."""
    acc_dtype = torch.float64 if torch.float64 in (factor.dtype, dtype) else torch.float32
    product = factor.to(acc_dtype)
    if scale is not None:
        product = product * (scale.to(acc_dtype) * scaling)[:, None]
    elif scaling is not None:
        product = product * scaling
    return round_to(product, dtype, rounding)
