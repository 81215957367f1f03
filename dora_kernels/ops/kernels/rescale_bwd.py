"""The one pass over dy: partial sums of dm, db and dyᵀh per chunk of tokens, and dZ; then a reduction over chunks."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..chunked import mm_fp32
from ..gpus import Gpu, gpu_of
from ..types import NormScale, Rounding
from .blocks import Matrix, addresses
from .chunks import token_chunks
from .launch import ALL_REGISTERS, TRITON_DTYPES, cdiv, contiguous, contiguous_rows, dot_of, either, signed32
from .lora_dot import Dot
from .rounding import round_to
from .weight_norm import TINY_FP32, TINY_FP64

MAX_FUSED_RANK = 64
"""Up to this rank, in 16 bits, dyᵀh is summed in the pass itself; above, its accumulator would spill and cuBLAS
computes it."""


class RescaleBwdConfig(NamedTuple):
    """Launch data. `chunks` programs share an output feature's tokens."""

    block_m: int
    block_n: int
    chunks: int
    num_warps: int
    num_stages: int


def rescale_bwd_config(
    tokens: int, out_features: int, itemsize: int, stored_itemsize: int, has_product: bool, gpu: Gpu
) -> RescaleBwdConfig:
    """By shape, types and architecture, and whether dyᵀh takes registers. Not by dZ, which takes them too: whether x
    trains would change the order of summation."""
    block_m, block_n = (32, 64) if itemsize < 8 else (16, 32)
    chunks = token_chunks(tokens, cdiv(out_features, block_n), 3 if has_product else 4, gpu)
    # Wider values, or rows that start at odd addresses, which take a pointer an element: more threads, or they spill.
    num_warps = 8 if stored_itemsize == 4 or out_features % 16 else 4
    return RescaleBwdConfig(block_m, block_n, chunks, num_warps, num_stages=2)


class Needs(NamedTuple):
    """What the pass over dy computes."""

    correlation: bool  # Σ dy ⊙ saved
    product: bool  # dyᵀh
    bias: bool  # Σ dy
    base: bool  # dZ


@triton.jit(do_not_specialize=["salt"])
def _rescale_bwd_kernel(
    # pointers
    dy_ptr, saved_ptr, base_bias_ptr, h_ptr, scale_ptr, correlation_ptr, product_ptr, bias_ptr, dz_ptr,
    # sizes
    scale_shift, M, N, R, tokens_per_chunk, salt,
    # strides
    stride_dm, stride_dn, stride_sm, stride_sn, stride_hm,
    # constexpr, without the number of chunks: each number of tokens would be compiled anew
    NEEDS: tl.constexpr, SAVED_HAS_BIAS: tl.constexpr, DITHERED: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = DOT.acc
    OPERAND: tl.constexpr = DOT.operand
    PRECISION: tl.constexpr = DOT.input_precision
    BLOCK_R: tl.constexpr = DOT.block_r
    chunk = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    correlation = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    product = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
    if NEEDS.base:
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0) - scale_shift
    if SAVED_HAS_BIAS:
        base_bias = tl.load(base_bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    end = tl.minimum((chunk + 1) * tokens_per_chunk, M)
    # Pointers to the first tokens: those to others are one number away, not 64-bit products of each row.
    rows = tl.arange(0, BLOCK_M)
    dy_ptrs = addresses(Matrix(dy_ptr, stride_dm, stride_dn), rows, offs_n)
    saved_ptrs = addresses(Matrix(saved_ptr, stride_sm, stride_sn), rows, offs_n)
    h_ptrs = addresses(Matrix(h_ptr, stride_hm, 1), rows, offs_r)
    dz_ptrs = addresses(Matrix(dz_ptr, N, 1), rows, offs_n)
    for start in tl.range(chunk * tokens_per_chunk, end, BLOCK_M, num_stages=3):
        offs_m, first = start + rows, tl.cast(start, tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptrs + first * stride_dm, mask=mask, other=0.0)
        if NEEDS.product:
            h = tl.load(h_ptrs + first * stride_hm, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            dy_t = tl.trans(dy.to(OPERAND))
            product = tl.dot(dy_t, h.to(OPERAND), product, input_precision=PRECISION, out_dtype=ACC)
        grad = dy.to(ACC)
        if NEEDS.correlation:
            saved = tl.load(saved_ptrs + first * stride_sm, mask=mask, other=0.0).to(ACC)
            if SAVED_HAS_BIAS:
                saved -= base_bias[None, :]
            correlation += grad * saved
        if NEEDS.bias:
            bias += grad
        if NEEDS.base:
            dz = round_to(grad * scale[None, :], offs_m, offs_n, salt, dz_ptr.dtype.element_ty, DITHERED)
            tl.store(dz_ptrs + first * N, dz, mask=mask)
    # Partials are [chunks, N] and [chunks, N, R].
    row = chunk.to(tl.int64) * N + offs_n
    if NEEDS.correlation:
        tl.store(correlation_ptr + row, tl.sum(correlation, axis=0), mask=mask_n)
    if NEEDS.bias:
        tl.store(bias_ptr + row, tl.sum(bias, axis=0), mask=mask_n)
    if NEEDS.product:
        mask_product = mask_n[:, None] & mask_r[None, :]
        tl.store(addresses(Matrix(product_ptr, R, 1), row, offs_r), product, mask=mask_product)


class Finish(NamedTuple):
    """What the reduction over chunks computes."""

    acc: tl.dtype
    from_base: bool
    needs_magnitude: bool
    needs_B: bool
    needs_bias: bool
    block_n: int
    block_r: int
    holds_scale: bool = False  # the product is dzᵀh, and the correlation is with V x
    cast_mode: str | None = None  # of s g ⊙ B
    casts_g: bool = True  # else of s B


def finish_ranks(dot: Dot) -> int:
    """How many ranks the reduction over chunks takes at once: more of them, masked element by element, spill."""
    return min(dot.block_r, 32)


@triton.jit(do_not_specialize=["salt", "salt_second"])
def _rescale_bwd_finish_kernel(
    # pointers
    correlation_ptr, product_ptr, bias_ptr, b_ptr, b_second_ptr, norm_ptr, scale_ptr,
    dm_ptr, db_lora_ptr, dbias_ptr, cast_ptr,
    # sizes; of each layer on axis 1 of the grid
    scaling: tl.float64, N, R, chunks, product_chunks, first_row_of_second, salt, salt_second,
    # constexpr
    FINISH: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = FINISH.acc
    BLOCK_N: tl.constexpr = FINISH.block_n
    BLOCK_R: tl.constexpr = FINISH.block_r
    scaling = tl.cast(scaling, ACC)
    layer, features = tl.program_id(1), tl.cast(tl.num_programs(1), tl.int64) * N
    own = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, offs_n = own < N, layer * N + own
    if FINISH.holds_scale:
        scale = tl.full([BLOCK_N], 1.0, dtype=ACC)
    else:
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
    correlation = tl.zeros([BLOCK_N], dtype=ACC)
    if FINISH.needs_magnitude:
        for chunk in range(0, chunks):
            correlation += tl.load(correlation_ptr + chunk * features + offs_n, mask=mask_n, other=0.0)
    if FINISH.needs_bias:
        bias = tl.zeros([BLOCK_N], dtype=ACC)
        for chunk in range(0, chunks):
            bias += tl.load(bias_ptr + chunk * features + offs_n, mask=mask_n, other=0.0)
        tl.store(dbias_ptr + offs_n, bias, mask=mask_n)
    lora = tl.zeros([BLOCK_N], dtype=ACC)  # rowsum(B ⊙ dyᵀh)
    if FINISH.needs_B or FINISH.cast_mode is not None or (FINISH.needs_magnitude and FINISH.from_base):
        b = Matrix(tl.where(layer == 0, b_ptr, b_second_ptr), R, 1)
        for start in range(0, R, BLOCK_R):
            offs_r = start + tl.arange(0, BLOCK_R)
            mask = mask_n[:, None] & (offs_r < R)[None, :]
            if FINISH.cast_mode is not None or (FINISH.needs_magnitude and FINISH.from_base):
                factor = tl.load(addresses(b, own, offs_r), mask=mask, other=0.0).to(ACC)
            if FINISH.needs_B or (FINISH.needs_magnitude and FINISH.from_base):
                product = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
                for chunk in range(0, product_chunks):
                    row = chunk * features + offs_n
                    product += tl.load(addresses(Matrix(product_ptr, R, 1), row, offs_r), mask=mask, other=0.0)
                if FINISH.needs_magnitude and FINISH.from_base:
                    lora += tl.sum(factor * product, axis=1)
                if FINISH.needs_B:
                    grad = product * (scale * scaling)[:, None]
                    tl.store(addresses(Matrix(db_lora_ptr, R, 1), offs_n, offs_r), grad, mask=mask)
            if FINISH.cast_mode is not None:
                # B is rounded by its own rows, as `scaled_cast` does it.
                rows = layer * first_row_of_second + own
                scaled = factor * (scale * scaling)[:, None] if FINISH.casts_g else factor * scaling
                rounded = round_to(
                    scaled, rows, offs_r, tl.where(layer == 0, salt, salt_second), cast_ptr.dtype.element_ty,
                    FINISH.cast_mode == "dithered",
                )  # fmt: skip
                tl.store(addresses(Matrix(cast_ptr, R, 1), offs_n, offs_r), rounded, mask=mask)
    if FINISH.needs_magnitude:
        norm = tl.load(norm_ptr + offs_n, mask=mask_n, other=1.0)
        if FINISH.from_base:
            quotient = (correlation + scaling * lora) / norm
        else:
            quotient = correlation / (scale * norm)
        tiny = TINY_FP32 if ACC == tl.float32 else TINY_FP64
        tl.store(dm_ptr + offs_n, tl.where(norm < tiny, 0.0, quotient), mask=mask_n)


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
    """Twin of `reference.rescale_bwd`."""
    (M, N), R, (norm, scale) = grad_y.shape, lora_B.shape[1], norm_scale
    h, lora_B, base_bias = h if h is None else contiguous_rows(h), contiguous(lora_B), contiguous(base_bias)
    dtype = scale.dtype
    needs_magnitude, needs_B, needs_bias = (d is not None for d in (magnitude_dtype, B_dtype, bias_dtype))
    from_base = needs_magnitude and saved_is == "base"
    needs_product = needs_B or from_base
    # Where nothing else needs the pass over dy, the product alone is a GEMM.
    dot = dot_of(R, grad_y.dtype, *(() if h is None else (h.dtype,)), acc=dtype, one_block_up_to=MAX_FUSED_RANK)
    fused_product = needs_product and dot.one_block and (needs_magnitude or needs_bias or needs_base)
    needs_sums = needs_magnitude or needs_product or needs_bias

    def empty(needed, *shape, like=dtype):
        return torch.empty(shape, dtype=like, device=grad_y.device) if needed else None

    grad_magnitude = empty(needs_magnitude, N, like=magnitude_dtype)
    grad_B = empty(needs_B, N, R, like=B_dtype)
    grad_bias = empty(needs_bias, N, like=bias_dtype)
    grad_base = empty(needs_base, M, N, like=grad_y.dtype)
    if N == 0 or not (needs_sums or needs_base):
        return grad_magnitude, grad_B, grad_bias, grad_base
    config = rescale_bwd_config(M, N, dtype.itemsize, grad_y.element_size(), fused_product, gpu_of(grad_y))
    correlation, bias = empty(needs_magnitude, config.chunks, N), empty(needs_bias, config.chunks, N)
    product = empty(fused_product, config.chunks, N, R)
    needs = Needs(needs_magnitude, fused_product, needs_bias, needs_base)
    unused = scale  # stands for pointers the kernel never follows
    if any(needs):
        _rescale_bwd_kernel[(cdiv(N, config.block_n), config.chunks)](
            grad_y, either(saved, unused), either(base_bias, unused), either(h, unused), scale,
            either(correlation, unused), either(product, unused), either(bias, unused), either(grad_base, unused),
            float(shifts_scale), M, N, R, cdiv(cdiv(M, config.block_m), config.chunks) * config.block_m,
            signed32(rounding.salt),
            *grad_y.stride(), *((0, 0) if saved is None else saved.stride()), 0 if h is None else h.stride(0),
            needs, needs_magnitude and base_bias is not None, rounding.mode == "dithered", dot,
            config.block_m, config.block_n,
            num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
        )  # fmt: skip
    if needs_product and not fused_product:
        product = mm_fp32(grad_y.T, h)[None]
    if needs_sums:
        block_n, salt = 32, signed32(rounding.salt)
        finish = Finish(
            TRITON_DTYPES[dtype], from_base, needs_magnitude, needs_B, needs_bias, block_n, finish_ranks(dot),
            cast_mode=None if B_into is None else rounding.mode, casts_g=B_has_g,
        )  # fmt: skip
        _rescale_bwd_finish_kernel[(cdiv(N, block_n), 1)](
            either(correlation, unused), either(product, unused), either(bias, unused), lora_B, lora_B, norm, scale,
            either(grad_magnitude, unused), either(grad_B, unused), either(grad_bias, unused), either(B_into, unused),
            scaling, N, R, config.chunks, product.shape[0] if needs_product else 0, 0, salt, salt,
            finish,
            num_warps=4, **ALL_REGISTERS,
        )  # fmt: skip
    return grad_magnitude, grad_B, grad_bias, grad_base
