"""n = ‖W + s B A‖ per output feature and g = m / n. B A is computed tile by tile on the tensor cores, never stored."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..base_weights import Packed
from ..gpus import Gpu, gpu_of
from ..types import NEAREST, NormScale, Rounding
from .base_weight import Format, WeightMemory, adapted_block, adapted_dot, weight_arguments
from .blocks import Matrix
from .cast import cast_strips
from .launch import ALL_REGISTERS, TRITON_DTYPES, acc_dtype, cdiv, contiguous, either, rank_blocks, signed32
from .lora_dot import Dot, rank_block

# Squares of fp32 numbers leave fp32's range below 1e-19 and above 1e19: where the plain sum has left [2⁻⁸⁰, 2¹²⁰] a
# second pass over the rows scales by a power of two. Other features keep the plain sum, bit for bit.
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
    splits: int
    num_warps: int
    num_stages: int
    in_flight: int | None  # blocks of K that are loaded ahead; None: as the compiler does by `num_stages`


def weight_norm_config(
    out_features: int, in_features: int, dot: Dot, gpu: Gpu, packed: bool = False, straddles: bool = False
) -> WeightNormConfig:
    """By shape and architecture alone, so that summation order never depends on load. `packed`: W is decoded, which
    takes registers. `straddles`: of NF4 whose blocks hold elements of two output features, and of int4 in activation
    order, read one by one."""
    aligned, in_flight = in_features % 16 == 0, None
    if dot.acc == tl.float64:
        block_n, block_k, num_warps, in_flight = 16, 32, 4, 4 if dot.one_block else None
    elif straddles:
        block_n, block_k, num_warps, in_flight = 16, 64, 8, 1 if dot.one_block else None
    elif not dot.one_block:
        # A is read again by each program, and B for each block of K: the larger the block, the fewer reads.
        block_n, block_k, num_warps = 32, 64, 8
        if dot.is_16_bit and aligned:
            block_n, block_k = 128, 128 if gpu.has_wgmma and not packed else 64
    elif dot.is_16_bit and aligned and gpu.products_spare_registers and not packed:
        block_n, block_k, num_warps, in_flight = 128, 64, 8, 3 if dot.block_r == 64 else 4
    elif dot.is_16_bit and aligned:
        block_n, block_k, num_warps, in_flight = 64, 64, 4, 4
    else:
        # With more of the rank in registers, or rows that start at odd addresses and are read in narrow pieces: more
        # threads, and fewer blocks in flight, or they spill.
        small = dot.block_r == 16 and aligned
        block_n, block_k, num_warps, in_flight = 16, 128, 4 if small else 8, 4 if small else 3
    programs = max(1, cdiv(out_features, block_n))
    # Eight warps a multiprocessor, and no wave that is nearly empty. A split of fewer than four blocks of K would be
    # all launch overhead.
    wanted, most = 8 // num_warps * gpu.multiprocessors // programs, in_features // (4 * block_k)
    splits = max(1, min(wanted, most, 16))
    return WeightNormConfig(block_n, block_k, splits, num_warps, num_stages=2, in_flight=in_flight)


@triton.jit
def any_beyond_range(plain, mask_n):
    """Whether a sum of squares, of those not masked, is too large or too small to be trusted; a NaN is neither."""
    return tl.max((((plain > PLAIN_MAX) | (plain < PLAIN_MIN)) & mask_n).to(tl.int32), axis=0) > 0


@triton.jit
def sums_of_squares(
    w, a, b, scaling, offs_n, k_start, k_end, N, K, R, FORMAT: tl.constexpr, DOT: tl.constexpr, CONFIG: tl.constexpr
):
    """Over k_start … k_end: Σ v², Σ (v 2⁻⁸⁰)², Σ (v 2⁸⁰)², each [block_n]; the last where the first is small alone."""
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_K: tl.constexpr = CONFIG.block_k
    ACC: tl.constexpr = DOT.acc
    b_block = rank_block(b, offs_n, offs_n < N, 0, R, DOT)
    plain = tl.zeros([BLOCK_N], dtype=ACC)
    squares = tl.zeros([BLOCK_N, BLOCK_K], dtype=ACC)
    for start in tl.range(k_start, k_end, BLOCK_K, num_stages=CONFIG.in_flight):
        v = adapted_block(w, a, b, b_block, scaling, offs_n, start, N, K, R, FORMAT, DOT, BLOCK_K)
        if DOT.one_block:
            squares += v * v
        else:
            # Large blocks: the registers go to the product.
            plain += tl.sum(v * v, axis=1)
    if DOT.one_block:
        plain = tl.sum(squares, axis=1)
    large, small = plain, plain
    if ACC == tl.float32:
        # Another part of the same rows may be large.
        large = plain * SCALE_DOWN * SCALE_DOWN
        if any_beyond_range(plain, offs_n < N):
            is_large = plain > PLAIN_MAX
            scale = tl.where(is_large, SCALE_DOWN, SCALE_UP)
            small = tl.zeros([BLOCK_N], dtype=ACC)
            for start in tl.range(k_start, k_end, BLOCK_K, num_stages=1):
                v = adapted_block(w, a, b, b_block, scaling, offs_n, start, N, K, R, FORMAT, DOT, BLOCK_K)
                v *= scale[:, None]
                small += tl.sum(v * v, axis=1)
            large = tl.where(is_large, small, large)
    return plain, large, small


@triton.jit
def norm_and_scale(plain, large, small, magnitude, ACC: tl.constexpr):
    """n and g from the sums: g = sign(m) max(|m| / n, 2⁻⁴⁰), 0 where n is subnormal; IEEE roots and quotients."""
    if ACC == tl.float32:
        # One root of the sum that is in its range: a root to the last bit takes twenty instructions.
        is_large, is_small = plain > PLAIN_MAX, plain < PLAIN_MIN
        scale = tl.where(is_large, SCALE_UP, tl.where(is_small, SCALE_DOWN, 1.0))
        norm = tl.sqrt_rn(tl.where(is_large, large, tl.where(is_small, small, plain))) * scale
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
def sum_splits(
    partial_ptr, offs_n, mask_n, N, ACC: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, splits=None
):
    """The three sums of squares, each [BLOCK_N], from the partial sums [3, SPLITS, N]; two only where one is beyond its
    range. `splits`: how many of them there are of each feature, where they differ."""
    plain = tl.zeros([BLOCK_N], dtype=ACC)
    for split in range(SPLITS):
        mask = mask_n if splits is None else mask_n & (split < splits)
        plain += tl.load(partial_ptr + split * N + offs_n, mask=mask, other=0.0)
    large, small = plain, plain
    if ACC == tl.float32:
        if any_beyond_range(plain, mask_n):
            large, small = tl.zeros([BLOCK_N], dtype=ACC), tl.zeros([BLOCK_N], dtype=ACC)
            for split in range(SPLITS):
                mask = mask_n if splits is None else mask_n & (split < splits)
                large += tl.load(partial_ptr + (SPLITS + split) * N + offs_n, mask=mask, other=0.0)
                small += tl.load(partial_ptr + (2 * SPLITS + split) * N + offs_n, mask=mask, other=0.0)
    return plain, large, small


@triton.jit(do_not_specialize=["salt"])
def _weight_norm_kernel(
    # pointers and strides
    w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, stride_wn, stride_wk,
    a_ptr, b_ptr, m_ptr, norm_ptr, scale_ptr, partial_ptr, cast_ptr,
    # sizes
    scaling: tl.float64, N, K, R, k_per_split, salt,
    # constexpr
    CAST_MODE: tl.constexpr, FORMAT: tl.constexpr, DOT: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    w = WeightMemory(w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, stride_wn, stride_wk)
    a, b = Matrix(a_ptr, K, 1), Matrix(b_ptr, R, 1)
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_K: tl.constexpr = CONFIG.block_k
    SPLITS: tl.constexpr = CONFIG.splits
    ACC: tl.constexpr = DOT.acc
    scaling = tl.cast(scaling, ACC)
    split = tl.program_id(1)
    if CAST_MODE is not None and split == 0:
        cast = Matrix(cast_ptr, K, 1)
        cast_strips(a, cast, tl.program_id(0), tl.num_programs(0), K, R, salt, BLOCK_K, DOT, CAST_MODE == "dithered")
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    k_end = tl.minimum((split + 1) * k_per_split, K)
    plain, large, small = sums_of_squares(
        w, a, b, scaling, offs_n, split * k_per_split, k_end, N, K, R, FORMAT, DOT, CONFIG
    )
    if SPLITS == 1:
        magnitude = tl.load(m_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
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
    # constexpr
    ACC: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    plain, large, small = sum_splits(partial_ptr, offs_n, mask_n, N, ACC, SPLITS, BLOCK_N)
    magnitude = tl.load(m_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    norm, scale = norm_and_scale(plain, large, small, magnitude, ACC)
    tl.store(norm_ptr + offs_n, norm, mask=mask_n)
    tl.store(scale_ptr + offs_n, scale, mask=mask_n)


def norm_launch(
    weight: torch.Tensor | Packed, weight_format: Format, lora_A: torch.Tensor, lora_B: torch.Tensor, acc: torch.dtype
) -> tuple[Dot, WeightNormConfig]:
    """How n is summed, in `acc`."""
    (N, K), gpu, packed = weight.shape, gpu_of(weight), isinstance(weight, Packed)
    # Of rank 64 elsewhere 128 rows of B spilled beside W.
    aligned = K % 16 == 0
    largest = 64 if gpu.products_spare_registers and not packed and aligned else 32
    dot = adapted_dot(weight, lora_A, lora_B, acc, **rank_blocks(gpu, len(lora_A), aligned, largest))
    return dot, weight_norm_config(N, K, dot, gpu, packed, weight_format.straddles)


def split_width(in_features: int, config: WeightNormConfig) -> int:
    """Input features that a program squares."""
    return cdiv(cdiv(in_features, config.block_k), config.splits) * config.block_k


def launch_weight_norm(
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    norm_scale: NormScale,
    cast_A: torch.Tensor | None = None,
    rounding: Rounding = NEAREST,
) -> tuple[torch.Tensor | None, int]:
    """Fills `norm_scale`, or returns partial sums [3 · splits, N] that are still to be added, and `splits`.

    The factors are contiguous. `cast_A` is filled beside, where it is given.
    """
    (N, K), R, (norm, scale) = weight.shape, lora_A.shape[0], norm_scale
    w, weight_format = weight_arguments(weight)
    dot, config = norm_launch(weight, weight_format, lora_A, lora_B, norm.dtype)
    splits = config.splits
    partial = torch.empty(3 * splits, N, dtype=norm.dtype, device=weight.device) if splits > 1 else None
    _weight_norm_kernel[(cdiv(N, config.block_n), splits)](
        *w, lora_A, lora_B, magnitude, norm, scale, either(partial, norm), either(cast_A, lora_A),
        scaling, N, K, R, split_width(K, config), signed32(rounding.salt),
        None if cast_A is None else rounding.mode,
        weight_format, dot, config,
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    return partial, splits


def empty_norm_scale(
    weight: torch.Tensor | Packed, lora_A: torch.Tensor, lora_B: torch.Tensor, magnitude: torch.Tensor
) -> NormScale:
    """Memory for n and g."""
    acc = acc_dtype(weight.dtype, lora_A.dtype, lora_B.dtype, magnitude.dtype)
    norm = torch.empty(weight.shape[0], dtype=acc, device=weight.device)
    return NormScale(norm, torch.empty_like(norm))


def weight_norm(
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    *,
    A_dtype: torch.dtype | None = None,
    rounding: Rounding = NEAREST,
    into: NormScale | None = None,
    A_into: torch.Tensor | None = None,
) -> tuple[NormScale, torch.Tensor | None]:
    """Twin of `reference.weight_norm`."""
    N, lora_A, lora_B, magnitude = weight.shape[0], contiguous(lora_A), contiguous(lora_B), contiguous(magnitude)
    norm_scale = empty_norm_scale(weight, lora_A, lora_B, magnitude) if into is None else into
    cast_A = A_into
    if A_dtype is not None and A_into is None:
        cast_A = torch.empty(lora_A.shape, dtype=A_dtype, device=lora_A.device)
    if N == 0:
        return norm_scale, cast_A
    partial, splits = launch_weight_norm(weight, lora_A, lora_B, magnitude, scaling, norm_scale, cast_A, rounding)
    if partial is not None:
        block_n = 128
        _weight_norm_finish_kernel[(cdiv(N, block_n),)](
            partial, magnitude, *norm_scale, N, TRITON_DTYPES[partial.dtype], splits, block_n, num_warps=4
        )
    return norm_scale, cast_A
