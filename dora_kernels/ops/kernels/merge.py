"""W' = g ⊙ (W + s B A), rounded once: norm and rescale in one launch, or rescale alone where g is given."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..base_weights import Nf4Weight, stored_rounding
from ..gpus import Gpu, gpu_of
from .base_weight import adapted_tile, straddles_of, weight_arguments
from .blocks import offsets_2d, rank_block_of
from .launch import ALL_REGISTERS, acc_dtype, precision_of, rank_block, signed32
from .rounding import round_to
from .weight_norm import (
    cast_strips,
    launch_weight_norm,
    norm_and_scale,
    sum_splits,
    sums_of_squares,
    weight_norm_config,
)


class MergeConfig(NamedTuple):
    """Launch data of the two-dimensional rescale grid."""

    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int


def merge_config(rank: int, itemsize: int) -> MergeConfig:
    """By rank and accumulator size."""
    block_r = rank_block(rank, itemsize)
    # With twice the rank in registers half the rows, or fp32 weights spill.
    block_n, block_k = (32, 32) if itemsize == 8 else (64, 64) if block_r == 16 else (32, 64)
    return MergeConfig(block_n, block_k, block_r, num_warps=8, num_stages=2)


def fuses_norm(
    out_features: int,
    in_features: int,
    rank: int,
    itemsize: int,
    weight_itemsize: float,
    gpu: Gpu,
    straddles: bool = False,
) -> bool:
    """Whether norm and rescale share a launch: only where a program's second read of its rows hits L2, and the rows
    give every multiprocessor a program."""
    config = weight_norm_config(out_features, in_features, rank, itemsize, gpu, straddles)
    programs = triton.cdiv(out_features, config.block_n)
    resident = min(programs, gpu.multiprocessors) * config.block_n * in_features * weight_itemsize
    return config.splits == 1 and resident <= gpu.l2_bytes // 2


@triton.jit(do_not_specialize=["salt"])
def _merge_fused_kernel(
    # pointers
    w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    a_ptr, b_ptr, m_ptr, merged_ptr, norm_ptr, scale_ptr, cast_ptr,
    # sizes
    scaling: tl.float64, N, K, R, salt,
    # strides
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_m,
    # constexpr
    NF4_BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, WEIGHT_DTYPE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    HAS_CAST: tl.constexpr, DITHERED_CAST: tl.constexpr, DITHERED: tl.constexpr,
    ONE_BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    w = (w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr)
    scaling = tl.cast(scaling, ACC)
    if HAS_CAST:
        cast_strips(a_ptr, cast_ptr, K, R, salt, stride_ar, stride_ak, ACC, DITHERED_CAST, BLOCK_K, BLOCK_R)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    plain, large, small = sums_of_squares(
        w, a_ptr, b_ptr, scaling, offs_n, 0, K, N, K, R,
        stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
        NF4_BLOCK, NESTED_BLOCK, WHOLE_BLOCKS, WEIGHT_DTYPE,
        ACC, DOT, INPUT_PRECISION, ONE_BLOCK, STAGES, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    magnitude = tl.load(m_ptr + offs_n * stride_m, mask=mask_n, other=0.0).to(ACC)
    norm, scale = norm_and_scale(plain, large, small, magnitude, ACC)
    tl.store(norm_ptr + offs_n, norm, mask=mask_n)
    tl.store(scale_ptr + offs_n, scale, mask=mask_n)
    first = rank_block_of(b_ptr, offs_n, mask_n, 0, R, stride_bn, stride_br, BLOCK_R)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        offs_k = start + tl.arange(0, BLOCK_K)
        v = adapted_tile(
            w, a_ptr, b_ptr, first, scaling, offs_n, start, N, K, R,
            stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
            NF4_BLOCK, NESTED_BLOCK, WHOLE_BLOCKS, WEIGHT_DTYPE,
            ACC, DOT, INPUT_PRECISION, ONE_BLOCK, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        merged = round_to(v * scale[:, None], offs_n, offs_k, salt, merged_ptr.dtype.element_ty, DITHERED)
        tl.store(merged_ptr + offsets_2d(offs_n, offs_k, K, 1), merged, mask=mask_n[:, None] & (offs_k < K)[None, :])


@triton.jit(do_not_specialize=["salt"])
def _merge_scale_kernel(
    # pointers
    w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    a_ptr, b_ptr, m_ptr, merged_ptr, norm_ptr, scale_ptr, partial_ptr,
    # sizes
    scaling: tl.float64, N, K, R, salt,
    # strides
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_m,
    # constexpr
    NF4_BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, WEIGHT_DTYPE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    SPLITS: tl.constexpr, DITHERED: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    w = (w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr)
    scaling = tl.cast(scaling, ACC)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    first = rank_block_of(b_ptr, offs_n, mask_n, 0, R, stride_bn, stride_br, BLOCK_R)
    v = adapted_tile(
        w, a_ptr, b_ptr, first, scaling, offs_n, tl.program_id(1) * BLOCK_K, N, K, R,
        stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
        NF4_BLOCK, NESTED_BLOCK, WHOLE_BLOCKS, WEIGHT_DTYPE,
        ACC, DOT, INPUT_PRECISION, ONE_BLOCK, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    if SPLITS == 1:
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
    else:
        # The norm's partial sums: each program of a row of the grid adds them alike, the first one keeps n and g.
        plain, large, small = sum_splits(partial_ptr, offs_n, mask_n, N, ACC, SPLITS, BLOCK_N)
        magnitude = tl.load(m_ptr + offs_n * stride_m, mask=mask_n, other=0.0).to(ACC)
        norm, scale = norm_and_scale(plain, large, small, magnitude, ACC)
        if tl.program_id(1) == 0:
            tl.store(norm_ptr + offs_n, norm, mask=mask_n)
            tl.store(scale_ptr + offs_n, scale, mask=mask_n)
    merged = round_to(v * scale[:, None], offs_n, offs_k, salt, merged_ptr.dtype.element_ty, DITHERED)
    tl.store(merged_ptr + offsets_2d(offs_n, offs_k, K, 1), merged, mask=mask_n[:, None] & (offs_k < K)[None, :])


def merge(
    weight: torch.Tensor | Nf4Weight,
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
    cast_A: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W' [N, K] in `dtype`, n [N] and g [N].

    With `weight_norm` and `mag_norm_scale` given (both or neither) the norm is not computed again and `magnitude` is
    not read: the backward's merge, or a frozen adapter's. Else `cast_A` [R, K], contiguous, receives A rounded to its
    dtype: the norm reads A anyway.
    """
    (N, K), R, gpu = weight.shape, lora_A.shape[0], gpu_of(weight)
    pointers, weight_strides, formats = weight_arguments(weight)
    straddles = straddles_of(weight)
    given = mag_norm_scale is not None
    if given:
        norm, scale, magnitude = weight_norm, mag_norm_scale, mag_norm_scale
    else:
        acc = acc_dtype(weight.dtype, lora_A.dtype, lora_B.dtype, magnitude.dtype)
        norm = torch.empty(N, dtype=acc, device=weight.device)
        scale = torch.empty_like(norm)
    merged = torch.empty(N, K, dtype=dtype, device=weight.device)
    if N == 0:
        return merged, norm, scale
    itemsize, dithered = scale.element_size(), stored_rounding(weight, rounding) == "dithered"
    strides = (*weight_strides, *lora_A.stride(), *lora_B.stride(), magnitude.stride(0))
    precision = precision_of(lora_A.dtype, lora_B.dtype, acc=scale.dtype)
    if not given and fuses_norm(N, K, R, itemsize, weight.element_size(), gpu, straddles):
        config = weight_norm_config(N, K, R, itemsize, gpu, straddles)
        _merge_fused_kernel[(triton.cdiv(N, config.block_n),)](
            *pointers, lora_A, lora_B, magnitude, merged, norm, scale, lora_A if cast_A is None else cast_A,
            scaling, N, K, R, signed32(salt),
            *strides,
            *formats, *precision, cast_A is not None, rounding == "dithered", dithered, *config.pipeline(R),
            config.block_n, config.block_k, config.block_r,
            num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
        )  # fmt: skip
        return merged, norm, scale
    partial, splits = None, 1
    if not given:
        partial, splits = launch_weight_norm(
            weight, lora_A, lora_B, magnitude, scaling, norm, scale, cast_A, rounding, salt
        )
    config = merge_config(R, itemsize)
    # At least one program a row, which keeps n and g, even for K = 0.
    _merge_scale_kernel[(triton.cdiv(N, config.block_n), max(1, triton.cdiv(K, config.block_k)))](
        *pointers, lora_A, lora_B, magnitude, merged, norm, scale, scale if partial is None else partial,
        scaling, N, K, R, signed32(salt),
        *strides,
        *formats, *precision, splits, dithered, R <= config.block_r, config.block_n, config.block_k, config.block_r,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return merged, norm, scale
