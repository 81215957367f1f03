"""n and g of every expert."""

import torch

from ..grouped import expert_rows
from ..types import NormScale
from .weight_norm import accumulate_dtype, weight_norm


def expert_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    *,
    ends: torch.Tensor | None = None,
) -> NormScale:
    """n and g [E, N] of W [E, N, K], A [E, R, K], B [E, N, R], m [E, N].

    With `ends` [E] those of experts without tokens are 0, and their weights are not read.
    """
    dtype = accumulate_dtype(weight, lora_A, lora_B, magnitude)
    norm = torch.zeros(weight.shape[:2], dtype=dtype, device=weight.device)
    scale = torch.zeros_like(norm)
    for e in range(len(weight)) if ends is None else [expert for expert, _ in expert_rows(ends)]:
        into = NormScale(norm[e], scale[e])
        weight_norm(weight[e], lora_A[e], lora_B[e], magnitude[e], scaling, into=into)
    return NormScale(norm, scale)
