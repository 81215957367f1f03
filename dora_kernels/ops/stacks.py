"""Norms and products of a stack of experts [E, N, K]: a tensor, or a quantised stack whose experts are decoded in turn.

Of a quantised stack one expert at a time is a matrix. Which experts have tokens must be here: it waits for the GPU.
"""

from types import ModuleType

import torch

from .base_weights import Fp8Stack, dense
from .grouped import expert_rows, grouped_mm
from .types import NormScale, Rounding

Stack = torch.Tensor | Fp8Stack


def stack_norm(
    ops: ModuleType,
    weight: Stack,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    *,
    ends: torch.Tensor | None = None,
) -> NormScale:
    """n and g [E, N], as `expert_norm`: one launch, or of a quantised stack one for each expert."""
    if isinstance(weight, torch.Tensor):
        return ops.expert_norm(weight, lora_A, lora_B, magnitude, scaling, ends=ends)
    dtype = torch.promote_types(lora_A.dtype, torch.promote_types(weight.dtype, torch.float32))
    norm = torch.zeros(weight.shape[:2], dtype=dtype, device=weight.device)
    scale = torch.zeros_like(norm)
    for e in range(len(weight)) if ends is None else [expert for expert, _ in expert_rows(ends)]:
        into = NormScale(norm[e], scale[e])
        ops.weight_norm(weight[e], lora_A[e], lora_B[e], magnitude[e], scaling, into=into)
    return NormScale(norm, scale)


def stack_mm(ops: ModuleType, x: torch.Tensor, weight: Stack, ends: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """Each row of x [S, …] with its expert's W [N, K], or with Wᵀ, in x's dtype."""
    if isinstance(weight, torch.Tensor):
        return grouped_mm(x, weight.mT if transposed else weight, ends)
    out = x.new_empty(len(x), weight.shape[1 if transposed else 2])
    for expert, rows in expert_rows(ends):
        matrix = dense(weight[expert], x.dtype, ops)
        torch.mm(x[rows], matrix.T if transposed else matrix, out=out[rows])
        del matrix  # before the next one is decoded
    return out


def merged_mm(
    ops: ModuleType,
    x: torch.Tensor,
    weight: Stack,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    norms: NormScale,
    scaling: float,
    rounding: Rounding,
    ends: torch.Tensor,
    *,
    transposed: bool,
) -> torch.Tensor:
    """Each row of x [S, …] with its expert's W' [N, K], or with W'ᵀ, in x's dtype.

    One buffer holds the W' of the expert whose turn it is.
    """
    _, N, K = weight.shape
    merged, out = x.new_empty(N, K), x.new_empty(len(x), N if transposed else K)
    for expert, rows in expert_rows(ends):
        ops.merge(
            weight[expert], lora_A[expert], lora_B[expert], None, scaling,
            dtype=x.dtype, rounding=rounding._replace(salt=rounding.salt + expert), out=merged,
            norm_scale=NormScale(norms.norm[expert], norms.scale[expert]),
        )  # fmt: skip
        torch.mm(x[rows], merged.T if transposed else merged, out=out[rows])
    return out
