"""W' = g ⊙ (W + s B A), rounded once: norm and rescale in one launch, or rescale alone where g is given."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .addresses import offsets_2d
from .launch import TRITON_DTYPES, Gpu, gpu_of, precision_of, rank_block, signed32
from .launch import acc_dtype as acc_dtype_of
from .rounding import round_to
from .tile import adapted_tile
from .weight_norm import norm_and_scale, sums_of_squares, weight_norm_config
from .weight_norm import weight_norm as launch_weight_norm


class MergeConfig(NamedTuple):
    """Launch data of the two-dimensional rescale grid."""

    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int


def merge_config(rank: int, itemsize: int) -> MergeConfig:
    """By rank and accumulator size."""
    block_n, block_k = (64, 64) if itemsize < 8 else (32, 32)
    return MergeConfig(block_n, block_k, rank_block(rank), num_warps=8 if itemsize < 8 else 4, num_stages=2)


def fuses_norm(out_features: int, in_features: int, rank: int, itemsize: int, weight_itemsize: int, gpu: Gpu) -> bool:
    """Whether norm and rescale share a launch: only where a program's second read of its rows hits L2, and the rows
    give every multiprocessor a program."""
    config = weight_norm_config(out_features, in_features, rank, itemsize, gpu)
    programs = triton.cdiv(out_features, config.block_n)
    resident = min(programs, gpu.multiprocessors) * config.block_n * in_features * weight_itemsize
    return config.splits == 1 and resident <= gpu.l2_bytes // 2


@triton.jit(do_not_specialize=["salt"])
def _merge_fused_kernel(
    # pointers
    w_ptr, a_ptr, b_ptr, m_ptr, merged_ptr, norm_ptr, scale_ptr,
    # sizes
    scaling: tl.float64, N, K, R, salt,
    # strides
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_m,
    # constexpr
    ACC: tl.constexpr, DOT: tl.constexpr, INPUT_PRECISION: tl.constexpr, DTYPE: tl.constexpr, DITHERED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    scaling = tl.cast(scaling, ACC)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    plain, large, small = sums_of_squares(
        w_ptr, a_ptr, b_ptr, scaling, offs_n, 0, K, N, K, R,
        stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
        ACC, DOT, INPUT_PRECISION, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    magnitude = tl.load(m_ptr + offs_n * stride_m, mask=mask_n, other=0.0).to(ACC)
    norm, scale = norm_and_scale(plain, large, small, magnitude, ACC)
    tl.store(norm_ptr + offs_n, norm, mask=mask_n)
    tl.store(scale_ptr + offs_n, scale, mask=mask_n)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        v = adapted_tile(
            w_ptr, a_ptr, b_ptr, scaling, offs_n, offs_k, N, K, R,
            stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
            ACC, DOT, INPUT_PRECISION, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        merged = round_to(v * scale[:, None], offs_n, offs_k, salt, DTYPE, DITHERED)
        tl.store(merged_ptr + offsets_2d(offs_n, offs_k, K, 1), merged, mask=mask_n[:, None] & (offs_k < K)[None, :])


@triton.jit(do_not_specialize=["salt"])
def _merge_scale_kernel(
    # pointers
    w_ptr, a_ptr, b_ptr, scale_ptr, merged_ptr,
    # sizes
    scaling: tl.float64, N, K, R, salt,
    # strides
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    # constexpr
    ACC: tl.constexpr, DOT: tl.constexpr, INPUT_PRECISION: tl.constexpr, DTYPE: tl.constexpr, DITHERED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    scaling = tl.cast(scaling, ACC)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    v = adapted_tile(
        w_ptr, a_ptr, b_ptr, scaling, offs_n, offs_k, N, K, R,
        stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
        ACC, DOT, INPUT_PRECISION, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
    merged = round_to(v * scale[:, None], offs_n, offs_k, salt, DTYPE, DITHERED)
    tl.store(merged_ptr + offsets_2d(offs_n, offs_k, K, 1), merged, mask=mask_n[:, None] & (offs_k < K)[None, :])


def merge(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor | None,
    scaling: float,
    *,
    dtype: torch.dtype,
    rounding: str,
    salt: int,
    weight_norm: torch.Tensor | None = None,
    mag_norm_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W' [N, K] in `dtype`, n [N] and g [N].

    With `weight_norm` and `mag_norm_scale` given (both or neither) the norm is not computed again and `magnitude` is
    not read: the backward's merge, or a frozen adapter's.
    """
    (N, K), R, gpu = weight.shape, lora_A.shape[0], gpu_of(weight)
    given = mag_norm_scale is not None
    acc_dtype = (
        mag_norm_scale.dtype if given else acc_dtype_of(weight.dtype, lora_A.dtype, lora_B.dtype, magnitude.dtype)
    )
    precision = precision_of(lora_A.dtype, lora_B.dtype, acc=acc_dtype)
    merged = torch.empty(N, K, dtype=dtype, device=weight.device)
    factors = (weight, lora_A, lora_B)
    strides = (*weight.stride(), *lora_A.stride(), *lora_B.stride())
    modes = (*precision, TRITON_DTYPES[dtype], rounding == "dithered")
    if N and not given and fuses_norm(N, K, R, acc_dtype.itemsize, weight.element_size(), gpu):
        norm = torch.empty(N, dtype=acc_dtype, device=weight.device)
        scale = torch.empty_like(norm)
        config = weight_norm_config(N, K, R, acc_dtype.itemsize, gpu)
        _merge_fused_kernel[(triton.cdiv(N, config.block_n),)](
            *factors, magnitude, merged, norm, scale,
            scaling, N, K, R, signed32(salt),
            *strides, magnitude.stride(0),
            *modes, config.block_n, config.block_k, config.block_r,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return merged, norm, scale
    norm, scale = (weight_norm, mag_norm_scale) if given else launch_weight_norm(*factors, magnitude, scaling)
    if merged.numel():
        config = merge_config(R, acc_dtype.itemsize)
        _merge_scale_kernel[(triton.cdiv(N, config.block_n), triton.cdiv(K, config.block_k))](
            *factors, scale, merged,
            scaling, N, K, R, signed32(salt),
            *strides,
            *modes, config.block_n, config.block_k, config.block_r,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return merged, norm, scale
