"""The one pass over a gated MLP's da: the gradients of gate and up, a again, and partial sums of dm and dB per chunk of
tokens; then a reduction over chunks."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..chunked import mm_fp32
from ..gpus import gpu_of
from ..types import GluFactors, GluGradients, Rounding
from .activations import activation, derivative
from .blocks import Matrix, addresses
from .chunks import token_chunks
from .glu_fwd import Glu, cuts_both, feature_vectors, largest_rank_block, layer_output
from .launch import ALL_REGISTERS, TRITON_DTYPES, cdiv, contiguous, contiguous_rows, dot_of, signed32
from .lora_dot import Dot, lora_dot, right_rank_block
from .rescale_bwd import Finish, _rescale_bwd_finish_kernel, finish_ranks


class GluBwdConfig(NamedTuple):
    """Launch data."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def glu_bwd_config(dot: Dot, features: int, dtype: torch.dtype, *, has_room: bool) -> GluBwdConfig:
    """By types, and whether rows start at aligned addresses. `has_room`: registers hold larger blocks."""
    if dot.acc == tl.float64:
        return GluBwdConfig(16, 32, num_warps=8, num_stages=2)
    if dtype.itemsize == 4 or features % 16 or (cuts_both(dot, dtype) and not has_room):
        # Wider values, rows that start at odd addresses, which take a pointer an element, or more pieces: larger blocks
        # spill.
        return GluBwdConfig(16, 64, num_warps=8, num_stages=2)
    return GluBwdConfig(32, 64, num_warps=8, num_stages=2)


@triton.jit
def _block_of_h(ptrs, mask):
    block = tl.load(ptrs, mask=mask, other=0.0)
    # A load alone, of fp32, the compiler would do in the layout of a dot: a number at a time.
    return tl.where(mask, block, 0.0) if block.dtype == tl.float32 else block


@triton.jit
def _glu_bwd_kernel(
    # pointers
    grad_a_ptr, gate_ptr, up_ptr, h_ptr, b_gate_ptr, b_up_ptr, scale_ptr, bias_ptr,
    grads_ptr, correlation_ptr, product_ptr,
    # sizes
    scaling: tl.float64, M, N, R, tokens_per_chunk,
    # strides
    stride_am, stride_an, stride_gm, stride_um,
    # constexpr, without the number of chunks: each number of tokens would be compiled anew
    GLU: tl.constexpr, FUSED_PRODUCT: tl.constexpr, DOT: tl.constexpr, PRODUCT: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_R: tl.constexpr = DOT.block_r
    ACC: tl.constexpr = DOT.acc
    ACTIVATION: tl.constexpr = GLU.activation
    OPERAND: tl.constexpr = PRODUCT.operand
    PRECISION: tl.constexpr = PRODUCT.input_precision
    DTYPE: tl.constexpr = grads_ptr.dtype.element_ty
    scaling = tl.cast(scaling, ACC)
    chunk = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    scale_gate, bias_gate = feature_vectors(scale_ptr, bias_ptr, offs_n, mask_n, GLU, ACC)
    scale_up, bias_up = feature_vectors(scale_ptr + N, bias_ptr + N, offs_n, mask_n, GLU, ACC)
    correlation_gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    correlation_up = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    product_gate = tl.zeros([BLOCK_R, BLOCK_N], dtype=ACC)
    product_up = tl.zeros([BLOCK_R, BLOCK_N], dtype=ACC)
    stride_hm = R if GLU.one_h else 2 * R
    h_gate = Matrix(h_ptr, stride_hm, 1)
    h_up = h_gate if GLU.one_h else Matrix(h_ptr + R, stride_hm, 1)
    b_gate, b_up = Matrix(b_gate_ptr, 1, R), Matrix(b_up_ptr, 1, R)
    b_gate_block = None
    b_up_block = None
    if GLU.in_token_space and DOT.one_block:
        # Once for all tokens, with their pieces.
        b_gate_block = right_rank_block(b_gate, offs_n, mask_n, 0, R, DOT)
        b_up_block = right_rank_block(b_up, offs_n, mask_n, 0, R, DOT)
    end = tl.minimum((chunk + 1) * tokens_per_chunk, M)
    # Pointers to the first tokens: those to others are one number away, not 64-bit products of each row.
    rows = tl.arange(0, BLOCK_M)
    a_ptrs = addresses(Matrix(grad_a_ptr, stride_am, stride_an), rows, offs_n)
    gate_ptrs = addresses(Matrix(gate_ptr, stride_gm, 1), rows, offs_n)
    up_ptrs = addresses(Matrix(up_ptr, stride_um, 1), rows, offs_n)
    grads_ptrs = addresses(Matrix(grads_ptr, 2 * N, 1), rows, offs_n)
    h_gate_ptrs = addresses(h_gate, rows, offs_r)
    h_up_ptrs = addresses(h_up, rows, offs_r)
    for start in tl.range(chunk * tokens_per_chunk, end, BLOCK_M, num_stages=CONFIG.num_stages):
        offs_m, first = start + rows, tl.cast(start, tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        # Of loads alone, the compiler would compute all that follows a second time, in the layout of the dots.
        grad = tl.where(mask, tl.load(a_ptrs + first * stride_am, mask=mask, other=0.0).to(ACC), 0.0)
        gate = tl.load(gate_ptrs + first * stride_gm, mask=mask, other=0.0).to(ACC)
        up = tl.load(up_ptrs + first * stride_um, mask=mask, other=0.0).to(ACC)
        if GLU.in_token_space or FUSED_PRODUCT:
            mask_h = mask_m[:, None] & mask_r[None, :]
            h_gate_block = _block_of_h(h_gate_ptrs + first * stride_hm, mask_h)
            h_up_block = h_gate_block
            if not GLU.one_h:
                h_up_block = _block_of_h(h_up_ptrs + first * stride_hm, mask_h)
        if GLU.in_token_space:
            gate += scaling * lora_dot(
                h_gate, b_gate, h_gate_block, offs_m, offs_n, mask_m, mask_n, R, DOT, b_gate_block
            )
            up += scaling * lora_dot(h_up, b_up, h_up_block, offs_m, offs_n, mask_m, mask_n, R, DOT, b_up_block)
        gate_out = layer_output(gate, scale_gate, bias_gate, GLU)
        up_out = layer_output(up, scale_up, bias_up, GLU)
        # Rounded as in forward, so that a has the forward's bits.
        activated = activation(gate_out, ACTIVATION).to(DTYPE).to(ACC)
        grad_gate = grad * up_out * derivative(gate_out, ACTIVATION)
        grad_up = grad * activated
        correlation_gate += grad_gate * gate
        correlation_up += grad_up * up
        if GLU.in_token_space:
            grad_gate *= scale_gate[None, :]
            grad_up *= scale_up[None, :]
        grad_gate, grad_up = grad_gate.to(DTYPE), grad_up.to(DTYPE)
        tl.store(a_ptrs + first * stride_am, (activated * up_out).to(DTYPE), mask=mask)
        tl.store(grads_ptrs + first * (2 * N), grad_gate, mask=mask)
        tl.store(grads_ptrs + first * (2 * N) + N, grad_up, mask=mask)
        if FUSED_PRODUCT:
            # hᵀ dy, not dyᵀ h, whose left factor the compiler would compute again in each warp.
            h_gate_t, h_up_t = tl.trans(h_gate_block.to(OPERAND)), tl.trans(h_up_block.to(OPERAND))
            gate_part, up_part = grad_gate.to(OPERAND), grad_up.to(OPERAND)
            product_gate = tl.dot(h_gate_t, gate_part, product_gate, input_precision=PRECISION, out_dtype=ACC)
            product_up = tl.dot(h_up_t, up_part, product_up, input_precision=PRECISION, out_dtype=ACC)
    # Partials are [chunks, 2 N] and [chunks, 2 N, R].
    row = chunk.to(tl.int64) * (2 * N) + offs_n
    tl.store(correlation_ptr + row, tl.sum(correlation_gate, axis=0), mask=mask_n)
    tl.store(correlation_ptr + row + N, tl.sum(correlation_up, axis=0), mask=mask_n)
    if FUSED_PRODUCT:
        mask_product = mask_r[:, None] & mask_n[None, :]
        tl.store(addresses(Matrix(product_ptr, 1, R), offs_r, row), product_gate, mask=mask_product)
        tl.store(addresses(Matrix(product_ptr, 1, R), offs_r, row + N), product_up, mask=mask_product)


def glu_bwd(
    grad_a: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    factors: GluFactors,
    bias: torch.Tensor | None,
    norm: torch.Tensor,
    *,
    space: str,
    activation: str,
    dtype: torch.dtype,
    roundings: tuple[Rounding, ...],
) -> GluGradients:
    """Twin of `reference.glu_bwd`."""
    (M, N), R, scale = gate.shape, factors.rank, factors.scale
    gate, up, bias, h = contiguous_rows(gate), contiguous_rows(up), contiguous(bias), contiguous(factors.h)
    lora_B, options = [contiguous(B) for B in factors.lora_B], {"device": gate.device}
    grads = torch.empty(M, 2 * N, dtype=gate.dtype, **options)
    grad_magnitude, grad_B = torch.empty(2 * N, dtype=dtype, **options), torch.empty(2 * N, R, dtype=dtype, **options)
    scaled_B = torch.empty(2 * N, R, dtype=gate.dtype, **options)
    if N == 0:
        return GluGradients(grads, grad_magnitude, grad_B, scaled_B)
    acc, in_token_space = scale.dtype, space == "token"
    glu = Glu(activation, in_token_space, bias is not None, h.shape[1] == R)
    dot = dot_of(R, h.dtype, lora_B[0].dtype, acc=acc, onto=gate.dtype, one_block_up_to=largest_rank_block(N))
    gpu = gpu_of(gate)
    config = glu_bwd_config(dot, N, gate.dtype, has_room=gpu.has_wgmma)
    chunks = token_chunks(M, cdiv(N, config.block_n), 1, gpu)
    correlation = torch.empty(chunks, 2 * N, dtype=acc, **options)
    # At higher ranks its accumulator would spill, and cuBLAS computes it.
    fused_product = dot.one_block and (R <= 32 or gpu.has_wgmma)
    product = torch.empty(chunks, 2 * N, R, dtype=acc, **options) if fused_product else correlation
    _glu_bwd_kernel[(cdiv(N, config.block_n), chunks)](
        grad_a, gate, up, h, *lora_B, scale, scale if bias is None else bias, grads, correlation, product,
        factors.scaling, M, N, R, cdiv(cdiv(M, config.block_m), chunks) * config.block_m,
        *grad_a.stride(), gate.stride(0), up.stride(0),
        glu, fused_product, dot, dot_of(R, gate.dtype, h.dtype, acc=acc), config,
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    if not fused_product:
        parts = [grads] if glu.one_h else grads.chunk(2, dim=1)
        hs = h.chunk(len(parts), dim=1)
        product = torch.cat([mm_fp32(part.T, h_part) for part, h_part in zip(parts, hs)])[None]
    block_n, salts = 32, [signed32(rounding.salt) for rounding in roundings]
    finish = Finish(
        TRITON_DTYPES[acc], from_base=False, needs_magnitude=True, needs_B=True, needs_bias=False, block_n=block_n,
        block_r=finish_ranks(dot), holds_scale=in_token_space, cast_mode=roundings[0].mode, casts_g=not in_token_space,
    )  # fmt: skip
    _rescale_bwd_finish_kernel[(cdiv(N, block_n), 2)](
        correlation, product, correlation, *lora_B, norm, scale, grad_magnitude, grad_B, grad_B, scaled_B,
        # One layer that holds both is rounded as one.
        factors.scaling, N, R, chunks, product.shape[0], N if len(salts) == 1 else 0, salts[0], salts[-1],
        finish,
        num_warps=4, **ALL_REGISTERS,
    )  # fmt: skip
    return GluGradients(grads, grad_magnitude, grad_B, scaled_B)
