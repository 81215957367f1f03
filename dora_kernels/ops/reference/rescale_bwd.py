"""The one pass over dy: gradients of the magnitude, B and the bias, and dZ = dy ⊙ g for token space."""

import torch

from ..chunked import row_chunks
from ..types import NormScale, Rounding
from .cast import scaled_cast
from .rounding import round_to


def rescale_bwd(
    grad_y: torch.Tensor,
    saved: torch.Tensor | None,
    h: torch.Tensor | None,
    lora_B: torch.Tensor,
    norm_scale: NormScale,
    scaling: float,
    *,
    saved_is: str,
    base_bias: torch.Tensor | None = None,
    magnitude_dtype: torch.dtype | None,
    B_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    needs_base: bool,
    shifts_scale: bool = False,
    B_into: torch.Tensor | None = None,
    B_has_g: bool = True,
    rounding: Rounding,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dm [N], dB [N, R] and db [N], each in the dtype asked for, and dZ [M, N] in `grad_y`'s; None where none is asked.

    `saved` [M, N] is the output without its bias (`saved_is` "output": dm = Σ dy ⊙ y / (g n)) or z = x Wᵀ ("base":
    dm = (Σ dy ⊙ z + s rowsum(B ⊙ dyᵀh)) / n), to which `base_bias` [N] was added where it is given.
    dZ = dy ⊙ g, or dy ⊙ (g − 1) with `shifts_scale`, under PEFT's dropout.

    `B_into` [N, R] takes s g ⊙ B, or s B without `B_has_g`, in its dtype, as `scaled_cast` rounds it, wherever a sum
    over tokens is asked for.
    """
    if B_into is not None:
        scaled_by = norm_scale.scale if B_has_g else None
        B_into.copy_(scaled_cast(lora_B, B_into.dtype, scale=scaled_by, scaling=scaling, rounding=rounding))
    norm, scale = norm_scale
    acc_dtype = scale.dtype
    needs_magnitude, needs_B, needs_bias = (dtype is not None for dtype in (magnitude_dtype, B_dtype, bias_dtype))
    shape, columns = grad_y.shape, grad_y.shape[1]
    grad_base = torch.empty(shape, dtype=grad_y.dtype, device=grad_y.device) if needs_base else None
    options = {"dtype": acc_dtype, "device": grad_y.device}
    from_base = needs_magnitude and saved_is == "base"
    product = torch.zeros(lora_B.shape[1], columns, **options) if needs_B or from_base else None
    correlation = torch.zeros(columns, **options) if needs_magnitude else None
    grad_bias = torch.zeros(columns, **options) if needs_bias else None
    # No number that is an argument: `torch.compile(dynamic=True)` would make a symbol of it, as in `scale_of`.
    base_scale = scale - 1.0 if shifts_scale else scale
    for rows in row_chunks(*shape):
        grad = grad_y[rows].to(acc_dtype)
        if product is not None:
            # hᵀ dy, not dyᵀ h: a GEMM with the long side as its columns is up to a third faster.
            product.addmm_(h[rows].to(acc_dtype).T, grad)
        if needs_magnitude:
            base = saved[rows].to(acc_dtype)
            correlation += (grad * (base if base_bias is None else base - base_bias)).sum(0)
            del base
        if needs_bias:
            grad_bias += grad.sum(0)
        if needs_base:
            # Unnamed: a chunk that outlives its turn makes the next one allocate fresh pages.
            grad_base[rows] = round_to(grad * base_scale, grad_base.dtype, rounding, rows.start)
    grad_magnitude = grad_B = None
    if needs_magnitude:
        if from_base:
            correlation += scaling * (lora_B.T.to(acc_dtype) * product).sum(0)
        divisor = norm if from_base else scale * norm
        # V is zero there: the same rule as in forward, no gradient passes.
        zero = norm < torch.finfo(acc_dtype).tiny
        grad_magnitude = torch.where(zero, torch.zeros_like(correlation), correlation / divisor).to(magnitude_dtype)
    if needs_B:
        grad_B = (product * (scaling * scale)).T.to(B_dtype, memory_format=torch.contiguous_format)
    if needs_bias:
        grad_bias = grad_bias.to(bias_dtype)
    return grad_magnitude, grad_B, grad_bias, grad_base
