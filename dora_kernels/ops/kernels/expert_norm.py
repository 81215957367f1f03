"""n and g of every expert in one launch: `weight_norm` with a grid of one axis more."""

import torch
import triton
import triton.language as tl

from ..gpus import gpu_of
from ..types import NormScale
from .base_weight import Format, WeightMemory, adapted_dot
from .blocks import Matrix
from .launch import ALL_REGISTERS, acc_dtype, cdiv, contiguous
from .weight_norm import norm_and_scale, sums_of_squares, weight_norm_config


@triton.jit
def _expert_norm_kernel(
    # pointers and strides
    w_ptr, stride_we, stride_wn, stride_wk, a_ptr, b_ptr, m_ptr, ends_ptr, norm_ptr, scale_ptr,
    # sizes
    scaling: tl.float64, N, K, R,
    # constexpr
    HAS_ENDS: tl.constexpr, FORMAT: tl.constexpr, DOT: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = CONFIG.block_n
    ACC: tl.constexpr = DOT.acc
    scaling = tl.cast(scaling, ACC)
    expert = tl.program_id(1)
    k_end = K
    if HAS_ENDS:  # an expert without tokens is not read
        start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        k_end = tl.where(tl.load(ends_ptr + expert) > start, K, 0)
    wide = tl.cast(expert, tl.int64)
    w_ptr += wide * stride_we
    w = WeightMemory(w_ptr, w_ptr, w_ptr, w_ptr, w_ptr, w_ptr, stride_wn, stride_wk)
    a, b = Matrix(a_ptr + wide * R * K, K, 1), Matrix(b_ptr + wide * N * R, R, 1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    plain, large, small = sums_of_squares(w, a, b, scaling, offs_n, 0, k_end, N, K, R, FORMAT, DOT, CONFIG)
    row = wide * N + offs_n
    magnitude = tl.load(m_ptr + row, mask=mask_n, other=0.0).to(ACC)
    norm, scale = norm_and_scale(plain, large, small, magnitude, ACC)
    tl.store(norm_ptr + row, norm, mask=mask_n)
    tl.store(scale_ptr + row, scale, mask=mask_n)


def expert_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    *,
    ends: torch.Tensor | None = None,
) -> NormScale:
    """Twin of `reference.expert_norm`."""
    (E, N, K), R = weight.shape, lora_A.shape[1]
    lora_A, lora_B, magnitude = contiguous(lora_A), contiguous(lora_B), contiguous(magnitude)
    acc = acc_dtype(weight.dtype, lora_A.dtype, lora_B.dtype, magnitude.dtype)
    norm = torch.empty(E, N, dtype=acc, device=weight.device)
    scale = torch.empty_like(norm)
    # The factors of one expert say how the product is computed.
    dot = adapted_dot(weight[0], lora_A[0], lora_B[0], acc)
    # The experts are programs enough.
    config = weight_norm_config(N, K, dot, gpu_of(weight))._replace(splits=1)
    _expert_norm_kernel[(cdiv(N, config.block_n), E)](
        weight, *weight.stride(), lora_A, lora_B, magnitude, norm if ends is None else ends, norm, scale,
        scaling, N, K, R,
        ends is not None, Format(), dot, config,
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    return NormScale(norm, scale)
