"""W' = g ⊙ (W + s B A), rounded once, after the norm where g is not given.

Norm and merge are two launches: in one, a program would keep its rows of W in L2 from pass to pass, in blocks so narrow
that reading A again for each takes longer than reading W from memory twice.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..base_weights import Packed, stored_rounding
from ..gpus import gpu_of
from ..types import NormScale, Rounding
from .base_weight import Format, WeightMemory, adapted_block, adapted_dot, weight_arguments
from .blocks import Matrix, addresses
from .cast import cast_strips
from .launch import ALL_REGISTERS, cdiv, contiguous, either, rank_blocks, signed32
from .lora_dot import Dot, rank_block
from .rounding import round_to
from .weight_norm import empty_norm_scale, launch_weight_norm, norm_and_scale, sum_splits


class Store(NamedTuple):
    """What a merge stores, and of how many partial sums it makes n and g; 1 where these are there."""

    splits: int
    dithered: bool  # W'
    cast_mode: str | None  # of A


class MergeConfig(NamedTuple):
    """Launch data of the two-dimensional rescale grid."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def merge_config(
    dot: Dot, in_features: int, straddles: bool = False, *, has_room: bool = False, decodes_much: bool = False
) -> MergeConfig:
    """By product, whether rows start at aligned addresses, and whether scales are read one by one. `has_room`: nothing
    but the product takes many registers. `decodes_much`: decoding takes so many that larger blocks spill."""
    if dot.acc == tl.float64:
        return MergeConfig(32, 32, num_warps=8, num_stages=2)
    if dot.is_16_bit:
        if in_features % 16 or straddles:
            # Each value read alone has an address of its own: larger blocks spill.
            return MergeConfig(64, 64, num_warps=8, num_stages=2)
        if decodes_much and dot.one_block:
            return MergeConfig(64, 64, num_warps=4, num_stages=2)
        if dot.one_block and dot.block_r <= 32:
            return MergeConfig(64, 128, num_warps=4, num_stages=2)
        # At high ranks time goes into reading A and B again for each block. Two blocks of rank 64 at once spilled.
        stages = 1 if dot.block_r == 64 else 2
        return MergeConfig(256 if has_room and dot.in_pieces else 128, 128, num_warps=8, num_stages=stages)
    # With twice the rank in registers half the rows, or fp32 weights spill.
    return MergeConfig(64 if dot.block_r == 16 else 32, 64, num_warps=8, num_stages=2)


def merge_launch(
    weight: torch.Tensor | Packed,
    weight_format: Format,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    acc: torch.dtype,
    dtype: torch.dtype,
    splits: int = 1,
) -> tuple[Dot, MergeConfig]:
    """How W' is merged in `acc` and stored in `dtype`, where n comes in so many partial sums."""
    (_, K), R, gpu = weight.shape, lora_A.shape[0], gpu_of(weight)
    dot = adapted_dot(weight, lora_A, lora_B, acc, **rank_blocks(gpu, R, K % 16 == 0))
    packed, whole = isinstance(weight, Packed), R % 16 == 0
    # Decoding, adding partial sums, and ranks that are masked element by element leave none for larger blocks.
    has_room = gpu.has_wgmma and not packed and splits == 1 and whole
    wide_and_masked = dtype == torch.float32 and not whole
    decodes_much = packed and not gpu.products_spare_registers and (weight_format.has_zeros or wide_and_masked)
    return dot, merge_config(dot, K, weight_format.straddles, has_room=has_room, decodes_much=decodes_much)


@triton.jit(do_not_specialize=["salt"])
def _merge_scale_kernel(
    # pointers and strides
    w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, stride_wn, stride_wk,
    a_ptr, b_ptr, m_ptr, merged_ptr, norm_ptr, scale_ptr, partial_ptr, cast_ptr,
    # sizes
    scaling: tl.float64, N, K, R, salt,
    # constexpr
    STORE: tl.constexpr, FORMAT: tl.constexpr, DOT: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    w = WeightMemory(w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, stride_wn, stride_wk)
    a, b = Matrix(a_ptr, K, 1), Matrix(b_ptr, R, 1)
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_K: tl.constexpr = CONFIG.block_k
    SPLITS: tl.constexpr = STORE.splits
    ACC: tl.constexpr = DOT.acc
    scaling = tl.cast(scaling, ACC)
    if STORE.cast_mode is not None:
        cast, programs = Matrix(cast_ptr, K, 1), tl.num_programs(0)
        cast_strips(a, cast, tl.program_id(0), programs, K, R, salt, BLOCK_K, DOT, STORE.cast_mode == "dithered")
    blocks_k = tl.maximum(tl.cdiv(K, BLOCK_K), 1)
    # From the last row up: the norm has just read those, and they are in L2 still.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    offs_n = block // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    start_k = block % blocks_k * BLOCK_K
    mask_n = offs_n < N
    b_block = rank_block(b, offs_n, mask_n, 0, R, DOT)
    v = adapted_block(w, a, b, b_block, scaling, offs_n, start_k, N, K, R, FORMAT, DOT, BLOCK_K)
    if SPLITS == 1:
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
    else:
        # The norm's partial sums: each program of a row of blocks adds them alike, the first one keeps n and g.
        plain, large, small = sum_splits(partial_ptr, offs_n, mask_n, N, ACC, SPLITS, BLOCK_N)
        magnitude = tl.load(m_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
        norm, scale = norm_and_scale(plain, large, small, magnitude, ACC)
        if start_k == 0:
            tl.store(norm_ptr + offs_n, norm, mask=mask_n)
            tl.store(scale_ptr + offs_n, scale, mask=mask_n)
    offs_k = start_k + tl.arange(0, BLOCK_K)
    merged = round_to(v * scale[:, None], offs_n, offs_k, salt, merged_ptr.dtype.element_ty, STORE.dithered)
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    tl.store(addresses(Matrix(merged_ptr, K, 1), offs_n, offs_k), merged, mask=mask)


def merge(
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor | None,
    scaling: float,
    *,
    dtype: torch.dtype,
    rounding: Rounding,
    norm_scale: NormScale | None = None,
    out: torch.Tensor | None = None,
    into: NormScale | None = None,
    A_into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, NormScale]:
    """Twin of `reference.merge`."""
    (N, K), R = weight.shape, lora_A.shape[0]
    lora_A, lora_B = contiguous(lora_A), contiguous(lora_B)
    w, weight_format = weight_arguments(weight)
    given = norm_scale is not None
    if given:
        magnitude = norm_scale.scale  # stands for a pointer that the kernel never follows
    else:
        magnitude = contiguous(magnitude)
        norm_scale = empty_norm_scale(weight, lora_A, lora_B, magnitude) if into is None else into
    merged = torch.empty(N, K, dtype=dtype, device=weight.device) if out is None else out
    if N == 0:
        return merged, norm_scale
    acc, dithered = norm_scale.scale.dtype, stored_rounding(weight, rounding.mode) == "dithered"
    pointers, sizes = (*w, lora_A, lora_B, magnitude, merged, *norm_scale), (scaling, N, K, R, signed32(rounding.salt))
    partial, splits = None, 1
    if not given:
        partial, splits = launch_weight_norm(weight, lora_A, lora_B, magnitude, scaling, norm_scale)
    dot, config = merge_launch(weight, weight_format, lora_A, lora_B, acc, dtype, splits)
    # At least one program a row, which keeps n and g, even for K = 0.
    _merge_scale_kernel[(cdiv(N, config.block_n) * max(1, cdiv(K, config.block_k)),)](
        *pointers, either(partial, norm_scale.scale), either(A_into, lora_A), *sizes,
        Store(splits, dithered, None if A_into is None else rounding.mode), weight_format, dot, config,
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    return merged, norm_scale
