"""Sums over each expert's tokens: partial ones per tile, then a reduction over the tiles of an expert."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..types import NormScale
from .blocks import Matrix, addresses
from .expert_tiles import most_tiles, rows_of_tile, tiles_of_expert
from .launch import ALL_REGISTERS, TRITON_DTYPES, cdiv, contiguous, dot_of, either, next_power_of_2, signed32
from .rounding import round_to
from .weight_norm import TINY_FP32, TINY_FP64

TILE = 512
"""Tokens whose sums one program takes: their partial sums weigh a sixteenth of what is read at rank 16."""


class Needs(NamedTuple):
    """What the pass over a gradient computes."""

    correlation: bool  # Σ dy ⊙ saved
    product: bool  # dyᵀ h
    base: bool  # dZ


class Partials(NamedTuple):
    """Of each tile, [tiles, N] and [tiles, N, R]; None where none is needed."""

    correlation: torch.Tensor | None
    product: torch.Tensor | None


@triton.jit(do_not_specialize=["salt"])
def _expert_sums_kernel(
    # pointers
    dy_ptr, saved_ptr, h_ptr, scale_ptr, ends_ptr, correlation_ptr, product_ptr, dz_ptr,
    # sizes
    N, R, E, salt,
    # strides
    stride_dm, stride_dn, stride_sm, stride_sn,
    # constexpr
    NEEDS: tl.constexpr, DITHERED: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = DOT.acc
    OPERAND: tl.constexpr = DOT.operand
    PRECISION: tl.constexpr = DOT.input_precision
    BLOCK_R: tl.constexpr = DOT.block_r
    tile, part = tl.program_id(1), tl.program_id(2)
    expert, start, first, end = rows_of_tile(ends_ptr, tile, E, TILE, BLOCK_E)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = part * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    correlation = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    product = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
    if NEEDS.base:
        scale = tl.load(scale_ptr + tl.cast(expert, tl.int64) * N + offs_n, mask=mask_n, other=0.0)
    # Loaded ahead for a product alone, fp32 values would be copied one by one.
    ALONE: tl.constexpr = NEEDS.product and not (NEEDS.correlation or NEEDS.base)
    STAGES: tl.constexpr = 1 if ALONE and dy_ptr.dtype.element_ty == tl.float32 else 3
    for row in tl.range(first, end, BLOCK_M, num_stages=STAGES):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        mask = mask_m[:, None] & mask_n[None, :]
        dy = tl.load(addresses(Matrix(dy_ptr, stride_dm, stride_dn), offs_m, offs_n), mask=mask, other=0.0)
        if NEEDS.product:
            h_mask = mask_m[:, None] & mask_r[None, :]
            h = tl.load(addresses(Matrix(h_ptr, R, 1), offs_m, offs_r), mask=h_mask, other=0.0)
            dy_t = tl.trans(dy.to(OPERAND))
            product = tl.dot(dy_t, h.to(OPERAND), product, input_precision=PRECISION, out_dtype=ACC)
        grad = dy.to(ACC)
        if NEEDS.correlation:
            saved = addresses(Matrix(saved_ptr, stride_sm, stride_sn), offs_m, offs_n)
            correlation += grad * tl.load(saved, mask=mask, other=0.0).to(ACC)
        if NEEDS.base:
            dz = grad * scale[None, :]
            dz = round_to(dz, offs_m - start, offs_n, salt + expert, dz_ptr.dtype.element_ty, DITHERED)
            # Each part of the rank has the same; the first one stores it.
            tl.store(addresses(Matrix(dz_ptr, N, 1), offs_m, offs_n), dz, mask=mask & (part == 0))
    rows = tl.cast(tile, tl.int64) * N + offs_n
    if NEEDS.correlation:
        tl.store(correlation_ptr + rows, tl.sum(correlation, axis=0), mask=mask_n & (part == 0))
    if NEEDS.product:
        mask_product = mask_n[:, None] & mask_r[None, :]
        tl.store(addresses(Matrix(product_ptr, R, 1), rows, offs_r), product, mask=mask_product)


@triton.jit
def _expert_sums_finish_kernel(
    # pointers
    correlation_ptr, product_ptr, b_ptr, norm_ptr, scale_ptr, ends_ptr, dm_ptr, out_ptr,
    # sizes and strides
    scaling: tl.float64, N, R, E, stride_on, stride_or,
    # constexpr
    ACC: tl.constexpr, HAS_SCALE: tl.constexpr, FROM_BASE: tl.constexpr, NEEDS_MAGNITUDE: tl.constexpr,
    NEEDS_PRODUCT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    scaling = tl.cast(scaling, ACC)
    expert = tl.program_id(1)
    first, end = tiles_of_expert(ends_ptr, expert, E, TILE, BLOCK_E)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows = tl.cast(expert, tl.int64) * N + offs_n
    if HAS_SCALE:
        scale = tl.load(scale_ptr + rows, mask=mask_n, other=0.0)
    if NEEDS_PRODUCT or FROM_BASE:
        lora = tl.zeros([BLOCK_N], dtype=ACC)  # rowsum(B ⊙ dyᵀh)
        for start in range(0, R, BLOCK_R):
            offs_r = start + tl.arange(0, BLOCK_R)
            mask = mask_n[:, None] & (offs_r < R)[None, :]
            product = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
            for tile in range(first, end):
                partial = tl.cast(tile, tl.int64) * N + offs_n
                product += tl.load(addresses(Matrix(product_ptr, R, 1), partial, offs_r), mask=mask, other=0.0)
            if FROM_BASE:
                factor = tl.load(addresses(Matrix(b_ptr, R, 1), rows, offs_r), mask=mask, other=0.0)
                lora += tl.sum(factor.to(ACC) * product, axis=1)
            if NEEDS_PRODUCT:
                if HAS_SCALE:
                    product *= (scale * scaling)[:, None]
                out = Matrix(out_ptr + tl.cast(expert, tl.int64) * N * R, stride_on, stride_or)
                tl.store(addresses(out, offs_n, offs_r), product, mask=mask)
    if NEEDS_MAGNITUDE:
        correlation = tl.zeros([BLOCK_N], dtype=ACC)
        for tile in range(first, end):
            correlation += tl.load(correlation_ptr + tl.cast(tile, tl.int64) * N + offs_n, mask=mask_n, other=0.0)
        norm = tl.load(norm_ptr + rows, mask=mask_n, other=1.0)
        if FROM_BASE:
            quotient = (correlation + scaling * lora) / norm
        else:
            quotient = correlation / (scale * norm)
        tiny = TINY_FP32 if ACC == tl.float32 else TINY_FP64
        tl.store(dm_ptr + rows, tl.where(norm < tiny, 0.0, quotient), mask=mask_n)


def launch_sums(
    grad: torch.Tensor,
    saved: torch.Tensor | None,
    h: torch.Tensor | None,
    scale: torch.Tensor | None,
    ends: torch.Tensor,
    needs: Needs,
    *,
    acc: torch.dtype,
    grad_base: torch.Tensor | None,
    salt: int,
    dithered: bool,
) -> Partials:
    """The partial sums; `grad_base` [S, N] is filled beside, where it is needed."""
    (S, N), E, h = grad.shape, ends.shape[0], contiguous(h)
    R = h.shape[1] if needs.product else 1
    tiles = most_tiles(S, E, TILE)
    correlation = torch.empty(tiles, N, dtype=acc, device=grad.device) if needs.correlation else None
    product = torch.empty(tiles, N, R, dtype=acc, device=grad.device) if needs.product else None
    if S == 0:
        return Partials(correlation, product)
    dot = dot_of(R, grad.dtype, h.dtype if needs.product else grad.dtype, acc=acc)
    block_m, block_n = (32, 64) if acc.itemsize < 8 else (16, 32)
    num_warps = 8 if grad.element_size() == 4 or N % 16 else 4
    unused = ends  # stands for pointers that the kernel never follows
    _expert_sums_kernel[(cdiv(N, block_n), tiles, cdiv(R, dot.block_r))](
        grad, either(saved, unused), either(h, unused), either(scale, unused), ends,
        either(correlation, unused), either(product, unused), either(grad_base, unused),
        N, R, E, signed32(salt),
        *grad.stride(), *((0, 0) if saved is None else saved.stride()),
        needs, dithered, dot, block_m, block_n, next_power_of_2(E), TILE,
        num_warps=num_warps, num_stages=2, **ALL_REGISTERS,
    )  # fmt: skip
    return Partials(correlation, product)


def launch_finish(
    partials: Partials,
    lora_B: torch.Tensor | None,
    norm_scale: NormScale | None,
    scaling: float,
    ends: torch.Tensor,
    *,
    acc: torch.dtype,
    grad_magnitude: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    """Fills dm [E, N], and `out` [E, N, R], which may be the transpose of what is contiguous: s g ⊙ the product with
    `norm_scale`, the product alone without. dm is of z = x Wᵀ where `lora_B` is given, else of y."""
    E = ends.shape[0]
    N = (partials.correlation if partials.product is None else partials.product).shape[1]
    R = 1 if partials.product is None else partials.product.shape[2]
    norm, scale = (None, None) if norm_scale is None else norm_scale
    block_n, block_r, unused = 32, dot_of(R, acc, acc=acc).block_r, ends
    _expert_sums_finish_kernel[(cdiv(N, block_n), E)](
        either(partials.correlation, unused), either(partials.product, unused), either(lora_B, unused),
        either(norm, unused), either(scale, unused), ends, either(grad_magnitude, unused), either(out, unused),
        scaling, N, R, E, *((0, 0) if out is None else out.stride()[1:]),
        TRITON_DTYPES[acc], norm_scale is not None, lora_B is not None and grad_magnitude is not None,
        grad_magnitude is not None, out is not None, block_n, block_r, next_power_of_2(E), TILE,
        num_warps=4, **ALL_REGISTERS,
    )  # fmt: skip
