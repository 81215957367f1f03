"""W' as it will be served: in the base's own format, by export's own quantiser, in training already (`merge_aware`).

    forward    y = x Q(W')ᵀ + b      W' = g ⊙ (W + s B A)      Q: the base's scales and zeros, the nearest codes
    backward   dx = dy Q(W')         dyᵀ x, the gradient by Q(W'), goes straight through Q, as W' 's

So A, B, m and b get what `dora_linear` says, where dm takes z = x Wᵀ: y has the error of Q in it. Over a dense base Q
is the rounding to its dtype, to nearest.

n and W' are summed in fp64 and rounded to fp32: kernels and PyTorch, a GPU that trains and a CPU that exports, find the
same codes.
"""

from types import ModuleType

import torch

from .base_weights import Fp4Weight, LibraryWeight, Nf4Weight, Packed, Weight
from .quantiser import nearest
from .types import NEAREST, NormScale


def why_not_served(weight: Weight) -> str | None:
    """Why W' has no codes in the weight's format that export could write, as what follows "it …"; None if it has."""
    if isinstance(weight, LibraryWeight):
        return f"is read by {weight.format} alone"
    if isinstance(weight, Nf4Weight) and weight.parity:
        return "is decoded with `nf4_parity`, which no checkpoint is"
    if isinstance(weight, Fp4Weight) and weight.is_factor:
        return "is a tensor of torchao's, which no export writes"
    return None


def served_norm(
    ops: ModuleType,
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
) -> NormScale:
    """n and g [N], in fp32, or in fp64 where an input is. Where m is n, g is 1; where n is zero, 0."""
    factors = lora_A, lora_B, magnitude
    dtype = torch.float64 if torch.float64 in {weight.dtype, *(f.dtype for f in factors)} else torch.float32
    norm = ops.weight_norm(weight, *(f.double() for f in factors), scaling)[0].norm.to(dtype)
    scale = magnitude.to(dtype) / norm
    return NormScale(norm, torch.where(norm < torch.finfo(dtype).tiny, torch.zeros_like(scale), scale))


def unquantised(
    ops: ModuleType,
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    norm_scale: NormScale,
    scaling: float,
) -> torch.Tensor:
    """W' [N, K] in the dtype of n: what is quantised, here and in export."""
    return ops.merge(
        weight, lora_A.double(), lora_B.double(), None, scaling, dtype=norm_scale.norm.dtype, rounding=NEAREST,
        norm_scale=NormScale(*(part.double() for part in norm_scale)),
    )[0]  # fmt: skip


def served_weight(
    ops: ModuleType,
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor | None,
    scaling: float,
    *,
    dtype: torch.dtype,
    norm_scale: NormScale | None = None,
) -> tuple[torch.Tensor, NormScale]:
    """Q(W') [N, K], decoded in `dtype`, and n and g. With `norm_scale` given `magnitude` is not read.

    NaN and infinity, which most formats lack, stay: a run that diverges is seen.
    """
    if norm_scale is None:
        norm_scale = served_norm(ops, weight, lora_A, lora_B, magnitude, scaling)
    merged = unquantised(ops, weight, lora_A, lora_B, norm_scale, scaling)
    if isinstance(weight, torch.Tensor):
        return merged.to(weight.dtype).to(dtype), norm_scale
    decoded = ops.decode(nearest(ops, weight, merged), dtype)
    return torch.where(torch.isfinite(merged), decoded, merged.to(dtype)), norm_scale
