"""What the operations of experts return, without values: the reference would ask which tokens are whose."""

import torch

from .types import NormScale


def expert_norm(weight, lora_A, lora_B, magnitude, scaling, *, ends=None):
    is_wide = torch.float64 in (weight.dtype, lora_A.dtype, lora_B.dtype, magnitude.dtype)
    dtype = torch.float64 if is_wide else torch.float32
    return NormScale(*(magnitude.new_empty(magnitude.shape, dtype=dtype) for _ in range(2)))


def expert_rescale_fwd(base_out, h, lora_B, mag_norm_scale, bias, scaling, ends, *, in_place, rounding):
    return base_out if in_place and base_out.is_contiguous() else base_out.new_empty(base_out.shape)


def expert_rescale_bwd(
    grad_y, saved, h, lora_B, norm_scale, scaling, ends, *, saved_is, magnitude_dtype, B_dtype, needs_base, rounding
):
    grad_magnitude = None if magnitude_dtype is None else lora_B.new_empty(lora_B.shape[:2], dtype=magnitude_dtype)
    grad_B = None if B_dtype is None else lora_B.new_empty(lora_B.shape, dtype=B_dtype)
    return grad_magnitude, grad_B, grad_y.new_empty(grad_y.shape) if needs_base else None


def expert_glu_fwd(base_out, h, lora_B, mag_norm_scale, scaling, ends, *, activation):
    return base_out.new_empty(base_out.shape[0], lora_B.shape[1] // 2)


def expert_glu_bwd(grad_a, base_out, h, lora_B, mag_norm_scale, scaling, ends, *, activation):
    return base_out.new_empty(base_out.shape)


def expert_wgrad(grad_h: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(ends.shape[0], grad_h.shape[1], x.shape[1], dtype=dtype)
