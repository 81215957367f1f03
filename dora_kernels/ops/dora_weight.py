"""`dora_weight`: W' of a layer as a tensor that trains its adapter, for a loss that reads a head's weight.

    forward    W' = g ⊙ (W + s B A)
    backward   C = dW' Aᵀ      dA = s (g ⊙ B)ᵀ dW'      dB = s g ⊙ C      dm = (rowsum(dW' ⊙ W) + s rowsum(B ⊙ C)) / n

`dora_linear` has the symbols; dW' [N, K] is the gradient by W'. The norm is detached.
"""

import torch

from . import dispatch
from .base_weights import Weight, dense, readable
from .chunked import GPU_CHUNK_ELEMENTS, mm_fp32, row_chunks
from .served import served_weight
from .types import Rounding


class DoraWeightFunction(torch.autograd.Function):
    """W' [N, K] in `dtype`, and the gradients of A, B and m. Beside W' itself nothing of its size is kept."""

    @staticmethod
    def forward(ctx, lora_A, lora_B, magnitude, weight, scaling, dtype, rounding, impl, merge_aware):
        ops = dispatch.implementation(impl)
        with dispatch.on_device_of(lora_A), dispatch.without_autocast(lora_A.device):
            factors = readable(weight), lora_A, lora_B, magnitude, scaling
            if merge_aware:
                merged, norm_scale = served_weight(ops, *factors, dtype=dtype)
            else:
                merged, norm_scale = ops.merge(*factors, dtype=dtype, rounding=rounding)
        ctx.scaling, ctx.impl, ctx.magnitude_dtype = scaling, impl, magnitude.dtype
        # A quantised weight is no tensor: its library's memory, which nothing here writes.
        ctx.quantized = None if isinstance(weight, torch.Tensor) else weight
        ctx.save_for_backward(lora_A, lora_B, *norm_scale, weight if ctx.quantized is None else None)
        return merged

    @staticmethod
    def backward(ctx, grad_merged):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("dora_weight cannot differentiate twice: call backward without create_graph=True")
        lora_A, lora_B, norm, scale, weight = ctx.saved_tensors
        needs_A, needs_B, needs_magnitude = ctx.needs_input_grad[:3]
        grad_A = grad_B = grad_magnitude = None
        with dispatch.on_device_of(grad_merged), dispatch.without_autocast(grad_merged.device):
            if needs_A:
                scaled = (ctx.scaling * scale[:, None] * lora_B.to(scale.dtype)).to(grad_merged.dtype)
                grad_A = mm_fp32(scaled.T, grad_merged).to(lora_A.dtype)
            if needs_B or needs_magnitude:
                product = mm_fp32(grad_merged, lora_A.to(grad_merged.dtype).T).to(scale.dtype)
            if needs_B:
                grad_B = (ctx.scaling * scale[:, None] * product).to(lora_B.dtype)
            if needs_magnitude:
                ops = dispatch.implementation(ctx.impl)
                base = dense(weight if ctx.quantized is None else ctx.quantized, grad_merged.dtype, ops)
                sums = ctx.scaling * (lora_B.to(scale.dtype) * product).sum(1)
                for rows in row_chunks(*base.shape, GPU_CHUNK_ELEMENTS if base.is_cuda else None):
                    sums[rows] += (grad_merged[rows].to(scale.dtype) * base[rows].to(scale.dtype)).sum(1)
                # V is zero there: no gradient passes, as in `dora_linear`.
                zero = norm < torch.finfo(norm.dtype).tiny
                grad_magnitude = torch.where(zero, torch.zeros_like(sums), sums / norm).to(ctx.magnitude_dtype)
        return grad_A, grad_B, grad_magnitude, None, None, None, None, None, None


def dora_weight(
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    *,
    scaling: float,
    dtype: torch.dtype,
    rounding: Rounding,
    impl: str = "auto",
    merge_aware: bool = False,
) -> torch.Tensor:
    """W' [out_features, in_features] in `dtype`, differentiable in `lora_A`, `lora_B` and `magnitude`, once.

    The arguments are those of `dora_linear`.
    """
    impl, _ = dispatch.choose_impl(weight.device, impl)
    return DoraWeightFunction.apply(
        lora_A, lora_B, magnitude, weight, float(scaling), dtype, rounding, impl, merge_aware
    )
