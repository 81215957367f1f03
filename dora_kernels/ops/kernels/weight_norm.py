"""n = ‖W + s B A‖ per output feature and g = m / n. B A is computed tile by tile on the tensor cores, never stored."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..base_weights import Nf4Weight
from ..gpus import Gpu, gpu_of
from .base_weight import adapted_tile, straddles_of, weight_arguments
from .blocks import offsets_2d, rank_block_of
from .launch import ALL_REGISTERS, TRITON_DTYPES, acc_dtype, precision_of, rank_block, signed32
from .rounding import round_to

# Squares of fp32 numbers leave fp32's range below 1e-19 and above 1e19: two more sums of squares, scaled by powers of
# two, are used where the plain one has left [2⁻⁸⁰, 2¹²⁰]. Other features keep the plain sum, bit for bit.
SCALE_UP = tl.constexpr(2.0**80)
SCALE_DOWN = tl.constexpr(2.0**-80)
PLAIN_MIN = tl.constexpr(2.0**-80)
PLAIN_MAX = tl.constexpr(2.0**120)
MIN_RATIO = tl.constexpr(2.0**-40)
TINY_FP32 = tl.constexpr(torch.finfo(torch.float32).tiny)
TINY_FP64 = tl.constexpr(torch.finfo(torch.float64).tiny)


class WeightNormConfig(NamedTuple):
    """Launch data. `splits` programs share an output feature's K where N alone gives too few programs."""

    block_n: int
    block_k: int
    block_r: int
    splits: int
    num_warps: int
    num_stages: int

    def pipeline(self, rank: int) -> tuple[bool, int | None]:
        """Whether one block holds the whole rank, and then how many blocks of K are in flight."""
        in_flight = 4 if self.num_warps == 4 else 3 if self.block_k == 128 else 1
        return (True, in_flight) if rank <= self.block_r else (False, None)


def weight_norm_config(
    out_features: int, in_features: int, rank: int, itemsize: int, gpu: Gpu, straddles: bool = False
) -> WeightNormConfig:
    """By shape and architecture alone, so that summation order never depends on load. `straddles`: of NF4 whose blocks
    hold elements of two output features, read one by one."""
    if itemsize == 8:
        block_n, block_k, num_warps = 16, 32, 4
    elif straddles:
        block_n, block_k, num_warps = 16, 64, 8
    elif rank <= 32:
        # With more of the rank in registers, or rows that start at odd addresses and are read in narrow pieces: more
        # threads, and fewer blocks in flight, or they spill.
        block_n, block_k, num_warps = 16, 128, 4 if rank <= 16 and in_features % 16 == 0 else 8
    else:
        # A is read again by each program: more features a program, fewer reads.
        block_n, block_k, num_warps = 32, 64, 8
    programs = triton.cdiv(out_features, block_n)
    # A split of fewer than four blocks of K would be all launch overhead.
    wanted, most = triton.cdiv(gpu.multiprocessors, max(1, programs)), max(1, in_features // (4 * block_k))
    splits = 1 if programs >= gpu.multiprocessors else min(wanted, most, 16)
    return WeightNormConfig(block_n, block_k, rank_block(rank, itemsize), splits, num_warps, num_stages=2)


@triton.jit
def sums_of_squares(
    w, a_ptr, b_ptr, scaling, offs_n, k_start, k_end, N, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    NF4_BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, WEIGHT_DTYPE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, INPUT_PRECISION: tl.constexpr, ONE_BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Over k_start … k_end: Σ v², Σ (v 2⁻⁸⁰)², Σ (v 2⁸⁰)², each [BLOCK_N]."""
    plain = tl.zeros([BLOCK_N, BLOCK_K], dtype=ACC)
    large = tl.zeros([BLOCK_N, BLOCK_K], dtype=ACC)
    small = tl.zeros([BLOCK_N, BLOCK_K], dtype=ACC)
    first = rank_block_of(b_ptr, offs_n, offs_n < N, 0, R, stride_bn, stride_br, BLOCK_R)
    for start in tl.range(k_start, k_end, BLOCK_K, num_stages=STAGES):
        v = adapted_tile(
            w, a_ptr, b_ptr, first, scaling, offs_n, start, N, K, R,
            stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
            NF4_BLOCK, NESTED_BLOCK, WHOLE_BLOCKS, WEIGHT_DTYPE,
            ACC, DOT, INPUT_PRECISION, ONE_BLOCK, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        plain += v * v
        if ACC == tl.float32:
            down, up = v * SCALE_DOWN, v * SCALE_UP
            large += down * down
            small += up * up
    return tl.sum(plain, axis=1), tl.sum(large, axis=1), tl.sum(small, axis=1)


@triton.jit
def norm_and_scale(plain, large, small, magnitude, ACC: tl.constexpr):
    """n and g from the sums: g = sign(m) max(|m| / n, 2⁻⁴⁰), 0 where n is subnormal; IEEE roots and quotients."""
    if ACC == tl.float32:
        norm = tl.where(plain > PLAIN_MAX, tl.sqrt_rn(large) * SCALE_UP, tl.sqrt_rn(plain))
        norm = tl.where(plain < PLAIN_MIN, tl.sqrt_rn(small) * SCALE_DOWN, norm)
        ratio = tl.div_rn(tl.abs(magnitude), norm)
        tiny = TINY_FP32
    else:
        norm = tl.sqrt(plain)
        ratio = tl.abs(magnitude) / norm
        tiny = TINY_FP64
    # Comparisons, not tl.maximum, which swallows NaN.
    ratio = tl.where(ratio < MIN_RATIO, MIN_RATIO, ratio)
    scale = tl.where(magnitude < 0, -ratio, ratio)
    return norm, tl.where(norm < tiny, 0.0, scale)


@triton.jit
def sum_splits(partial_ptr, offs_n, mask_n, N, ACC: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The three sums of squares, each [BLOCK_N], from the partial sums [3, SPLITS, N]."""
    plain = tl.zeros([BLOCK_N], dtype=ACC)
    large = tl.zeros([BLOCK_N], dtype=ACC)
    small = tl.zeros([BLOCK_N], dtype=ACC)
    for split in range(SPLITS):
        plain += tl.load(partial_ptr + split * N + offs_n, mask=mask_n, other=0.0)
        large += tl.load(partial_ptr + (SPLITS + split) * N + offs_n, mask=mask_n, other=0.0)
        small += tl.load(partial_ptr + (2 * SPLITS + split) * N + offs_n, mask=mask_n, other=0.0)
    return plain, large, small


@triton.jit
def cast_strips(
    a_ptr, cast_ptr, K, R, salt, stride_ar, stride_ak,
    ACC: tl.constexpr, DITHERED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A [R, K] rounded into contiguous memory, its columns dealt out over the programs of axis 0."""
    for start in range(tl.program_id(0) * BLOCK_K, K, tl.num_programs(0) * BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        for start_r in range(0, R, BLOCK_R):
            offs_r = start_r + tl.arange(0, BLOCK_R)
            mask = (offs_r < R)[:, None] & (offs_k < K)[None, :]
            factor = tl.load(a_ptr + offsets_2d(offs_r, offs_k, stride_ar, stride_ak), mask=mask, other=0.0).to(ACC)
            cast = round_to(factor, offs_r, offs_k, salt, cast_ptr.dtype.element_ty, DITHERED)
            tl.store(cast_ptr + offsets_2d(offs_r, offs_k, K, 1), cast, mask=mask)


@triton.jit(do_not_specialize=["salt"])
def _weight_norm_kernel(
    # pointers
    w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    a_ptr, b_ptr, m_ptr, norm_ptr, scale_ptr, partial_ptr, cast_ptr,
    # sizes
    scaling: tl.float64, N, K, R, k_per_split, salt,
    # strides
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_m,
    # constexpr
    NF4_BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, WEIGHT_DTYPE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    HAS_CAST: tl.constexpr, DITHERED: tl.constexpr, SPLITS: tl.constexpr, ONE_BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    w = (w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr)
    scaling = tl.cast(scaling, ACC)
    split = tl.program_id(1)
    if HAS_CAST and split == 0:
        cast_strips(a_ptr, cast_ptr, K, R, salt, stride_ar, stride_ak, ACC, DITHERED, BLOCK_K, BLOCK_R)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    plain, large, small = sums_of_squares(
        w, a_ptr, b_ptr, scaling, offs_n, split * k_per_split, tl.minimum((split + 1) * k_per_split, K), N, K, R,
        stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
        NF4_BLOCK, NESTED_BLOCK, WHOLE_BLOCKS, WEIGHT_DTYPE,
        ACC, DOT, INPUT_PRECISION, ONE_BLOCK, STAGES, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    if SPLITS == 1:
        magnitude = tl.load(m_ptr + offs_n * stride_m, mask=mask_n, other=0.0).to(ACC)
        norm, scale = norm_and_scale(plain, large, small, magnitude, ACC)
        tl.store(norm_ptr + offs_n, norm, mask=mask_n)
        tl.store(scale_ptr + offs_n, scale, mask=mask_n)
    else:
        tl.store(partial_ptr + split * N + offs_n, plain, mask=mask_n)
        tl.store(partial_ptr + (SPLITS + split) * N + offs_n, large, mask=mask_n)
        tl.store(partial_ptr + (2 * SPLITS + split) * N + offs_n, small, mask=mask_n)


@triton.jit
def _weight_norm_finish_kernel(
    # pointers
    partial_ptr, m_ptr, norm_ptr, scale_ptr,
    # sizes
    N,
    # strides
    stride_m,
    # constexpr
    ACC: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    plain, large, small = sum_splits(partial_ptr, offs_n, mask_n, N, ACC, SPLITS, BLOCK_N)
    magnitude = tl.load(m_ptr + offs_n * stride_m, mask=mask_n, other=0.0).to(ACC)
    norm, scale = norm_and_scale(plain, large, small, magnitude, ACC)
    tl.store(norm_ptr + offs_n, norm, mask=mask_n)
    tl.store(scale_ptr + offs_n, scale, mask=mask_n)


def launch_weight_norm(
    weight: torch.Tensor | Nf4Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    norm: torch.Tensor,
    scale: torch.Tensor,
    cast_A: torch.Tensor | None,
    rounding: str,
    salt: int,
) -> tuple[torch.Tensor | None, int]:
    """Fills `norm` and `scale`, or returns partial sums [3 · splits, N] that are still to be added, and `splits`."""
    (N, K), R = weight.shape, lora_A.shape[0]
    pointers, strides, formats = weight_arguments(weight)
    config = weight_norm_config(N, K, R, norm.element_size(), gpu_of(weight), straddles_of(weight))
    splits = config.splits
    partial = torch.empty(3 * splits, N, dtype=norm.dtype, device=weight.device) if splits > 1 else None
    k_per_split = triton.cdiv(triton.cdiv(K, config.block_k), splits) * config.block_k
    _weight_norm_kernel[(triton.cdiv(N, config.block_n), splits)](
        *pointers, lora_A, lora_B, magnitude, norm, scale,
        norm if partial is None else partial, lora_A if cast_A is None else cast_A,
        scaling, N, K, R, k_per_split, signed32(salt),
        *strides, *lora_A.stride(), *lora_B.stride(), magnitude.stride(0),
        *formats, *precision_of(lora_A.dtype, lora_B.dtype, acc=norm.dtype),
        cast_A is not None, rounding == "dithered", splits, *config.pipeline(R),
        config.block_n, config.block_k, config.block_r,
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    return partial, splits


def weight_norm(
    weight: torch.Tensor | Nf4Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    *,
    cast_A: torch.Tensor | None = None,
    rounding: str = "nearest",
    salt: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """n and g of W [N, K], A [R, K], B [N, R], m [N]: two [N] tensors, fp32 (fp64 where an input is fp64).

    `cast_A` [R, K], contiguous, receives A rounded to its dtype: the norm reads A anyway.
    """
    N = weight.shape[0]
    dtype = acc_dtype(weight.dtype, lora_A.dtype, lora_B.dtype, magnitude.dtype)
    norm = torch.empty(N, dtype=dtype, device=weight.device)
    scale = torch.empty_like(norm)
    if N == 0:
        return norm, scale
    partial, splits = launch_weight_norm(
        weight, lora_A, lora_B, magnitude, scaling, norm, scale, cast_A, rounding, salt
    )
    if partial is not None:
        block_n = 128
        _weight_norm_finish_kernel[(triton.cdiv(N, block_n),)](
            partial, magnitude, norm, scale, N, magnitude.stride(0), TRITON_DTYPES[dtype], splits, block_n, num_warps=4
        )
    return norm, scale
