"""a = act(gate) ⊙ up of a gated MLP: one read of both layers' products, one store of a.

N are the features of gate, and of up. A program walks a chunk of the tokens, so that it reads B once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..gpus import gpu_of
from ..types import GluFactors
from .activations import activation
from .blocks import Matrix, addresses
from .chunks import token_chunks
from .launch import ALL_REGISTERS, acc_dtype, cdiv, contiguous, contiguous_rows, dot_of, rank_blocks
from .lora_dot import Dot, lora_dot, right_rank_block


class Glu(NamedTuple):
    """What a pass over gate and up is of."""

    activation: str
    in_token_space: bool  # gate and up are z = x Wᵀ; else x W'ᵀ
    has_bias: bool
    one_h: bool  # [M, R], of both layers; else [M, 2 R]


class GluFwdConfig(NamedTuple):
    """Launch data."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def largest_rank_block(features: int) -> int:
    """The pieces of gate's and up's B stay with a program for all its tokens: 48 KiB of shared memory. Rows that start
    at odd addresses take registers of their own."""
    return 32 if features % 16 else 64


def cuts_both(dot: Dot, dtype: torch.dtype) -> bool:
    """Whether h and B become pieces in blocks that fill the registers: of bf16 layers h is bf16 already."""
    return dot.in_pieces and dtype == torch.float16 and (dot.block_r > 32 or not dot.one_block)


def glu_fwd_config(
    dot: Dot, features: int, dtype: torch.dtype, *, has_room: bool, has_bias: bool = False
) -> GluFwdConfig:
    """By product, and whether rows start at aligned addresses. `has_room`: registers hold larger blocks, without a bias
    at least."""
    if dot.acc == tl.float64:
        return GluFwdConfig(16, 32, num_warps=8, num_stages=2)
    if dtype.itemsize == 4:
        return GluFwdConfig(32, 64, num_warps=8, num_stages=2)
    if features % 16:
        # Rows that start at odd addresses take a pointer an element.
        return GluFwdConfig(32, 64, num_warps=8, num_stages=1)
    if cuts_both(dot, dtype) and (has_bias or not has_room):
        return GluFwdConfig(32, 64, num_warps=8, num_stages=2)
    if not dot.one_block and has_bias:
        return GluFwdConfig(128, 32, num_warps=8, num_stages=2) if has_room else GluFwdConfig(32, 64, 4, num_stages=2)
    if not dot.one_block:
        # At high ranks time goes into reading h and B again for each block.
        return GluFwdConfig(128, 64, num_warps=8, num_stages=2)
    return GluFwdConfig(64 if has_room and not has_bias else 32, 64, num_warps=4, num_stages=2)


@triton.jit
def layer_output(product, scale, bias, GLU: tl.constexpr):
    """What a layer returns, of z + s h Bᵀ in token space, of x W'ᵀ in weight space."""
    if GLU.in_token_space:
        product *= scale[None, :]
    if GLU.has_bias:
        product += bias[None, :]
    return product


@triton.jit
def feature_vectors(scale_ptr, bias_ptr, offs_n, mask_n, GLU: tl.constexpr, ACC: tl.constexpr):
    """g and b of a layer; zeros for one that is not used."""
    scale = tl.zeros([offs_n.shape[0]], dtype=ACC)
    bias = scale
    if GLU.in_token_space:
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
    if GLU.has_bias:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    return scale, bias


@triton.jit
def _glu_fwd_kernel(
    # pointers
    gate_ptr, up_ptr, h_ptr, b_gate_ptr, b_up_ptr, scale_ptr, bias_ptr, a_ptr,
    # sizes
    scaling: tl.float64, M, N, R, tokens_per_chunk,
    # strides
    stride_gm, stride_um,
    # constexpr
    GLU: tl.constexpr, DOT: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    ACC: tl.constexpr = DOT.acc
    ACTIVATION: tl.constexpr = GLU.activation
    scaling = tl.cast(scaling, ACC)
    chunk = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if DOT.one_block:
        scale_gate, bias_gate = feature_vectors(scale_ptr, bias_ptr, offs_n, mask_n, GLU, ACC)
        scale_up, bias_up = feature_vectors(scale_ptr + N, bias_ptr + N, offs_n, mask_n, GLU, ACC)
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
    rows, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, DOT.block_r)
    mask_r = offs_r < R
    gate_ptrs = addresses(Matrix(gate_ptr, stride_gm, 1), rows, offs_n)
    up_ptrs = addresses(Matrix(up_ptr, stride_um, 1), rows, offs_n)
    a_ptrs = addresses(Matrix(a_ptr, N, 1), rows, offs_n)
    h_gate_ptrs = addresses(h_gate, rows, offs_r)
    h_up_ptrs = addresses(h_up, rows, offs_r)
    for start in tl.range(chunk * tokens_per_chunk, end, BLOCK_M, num_stages=CONFIG.num_stages):
        offs_m, first = start + rows, tl.cast(start, tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        gate = tl.load(gate_ptrs + first * stride_gm, mask=mask, other=0.0).to(ACC)
        up = tl.load(up_ptrs + first * stride_um, mask=mask, other=0.0).to(ACC)
        if GLU.in_token_space:
            mask_h = mask_m[:, None] & mask_r[None, :]
            h_block = tl.load(h_gate_ptrs + first * stride_hm, mask=mask_h, other=0.0)
            gate += scaling * lora_dot(h_gate, b_gate, h_block, offs_m, offs_n, mask_m, mask_n, R, DOT, b_gate_block)
            if not GLU.one_h:
                h_block = tl.load(h_up_ptrs + first * stride_hm, mask=mask_h, other=0.0)
            up += scaling * lora_dot(h_up, b_up, h_block, offs_m, offs_n, mask_m, mask_n, R, DOT, b_up_block)
        if not DOT.one_block:
            # Not before: large products leave them no registers.
            scale_gate, bias_gate = feature_vectors(scale_ptr, bias_ptr, offs_n, mask_n, GLU, ACC)
            scale_up, bias_up = feature_vectors(scale_ptr + N, bias_ptr + N, offs_n, mask_n, GLU, ACC)
        gate = layer_output(gate, scale_gate, bias_gate, GLU)
        up = layer_output(up, scale_up, bias_up, GLU)
        # Rounded where a model stores it.
        activated = activation(gate, ACTIVATION).to(a_ptr.dtype.element_ty).to(ACC)
        tl.store(a_ptrs + first * N, (activated * up).to(a_ptr.dtype.element_ty), mask=mask)


def glu_fwd(
    gate: torch.Tensor,
    up: torch.Tensor,
    factors: GluFactors | None,
    bias: torch.Tensor | None,
    *,
    activation: str,
) -> torch.Tensor:
    """Twin of `reference.glu_fwd`."""
    (M, N), acc = gate.shape, acc_dtype(gate.dtype) if factors is None else factors.scale.dtype
    a = torch.empty(M, N, dtype=gate.dtype, device=gate.device)
    if a.numel() == 0:
        return a
    gate, up, bias = contiguous_rows(gate), contiguous_rows(up), contiguous(bias)
    unused = gate  # stands for pointers the kernel never follows
    R, h, lora_B, scale, scaling = 1, unused, (unused, unused), unused, 1.0
    if factors is not None:
        R, h, lora_B = factors.rank, contiguous(factors.h), [contiguous(B) for B in factors.lora_B]
        scale, scaling = factors.scale, factors.scaling
    gpu = gpu_of(gate)
    # A bias, and pieces of both factors, take smaller blocks of tokens, whose sums stay in registers.
    has_room = N % 16 == 0 and bias is None and gate.dtype == torch.bfloat16
    blocks = rank_blocks(gpu, R, has_room, largest_rank_block(N))
    dot = dot_of(R, h.dtype, lora_B[0].dtype, acc=acc, onto=gate.dtype, **blocks)
    glu = Glu(activation, factors is not None, bias is not None, h.shape[1] == R)
    config = glu_fwd_config(dot, N, gate.dtype, has_room=gpu.has_wgmma, has_bias=bias is not None)
    # With B and its pieces in registers fewer run at once.
    resident = 3 if factors is None else 2 if dot.one_block else 1
    chunks = token_chunks(M, cdiv(N, config.block_n), resident, gpu)
    _glu_fwd_kernel[(cdiv(N, config.block_n), chunks)](
        gate, up, h, *lora_B, scale, unused if bias is None else bias, a,
        scaling, M, N, R, cdiv(cdiv(M, config.block_m), chunks) * config.block_m,
        gate.stride(0), up.stride(0),
        glu, dot, config,
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    return a
