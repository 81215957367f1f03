"""a = act(gate) ⊙ up of a gated MLP: one read of both layers' products, one store of a.

N are the features of gate, and of up.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..types import GluFactors
from .activations import activation
from .blocks import Matrix, addresses
from .launch import ALL_REGISTERS, acc_dtype, contiguous, contiguous_rows, dot_of
from .lora_dot import Dot, lora_dot, rank_block


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


def glu_fwd_config(dot: Dot, features: int, itemsize: int) -> GluFwdConfig:
    """By product, and whether rows start at aligned addresses."""
    if dot.acc == tl.float64:
        return GluFwdConfig(32, 32, num_warps=8, num_stages=2)
    if itemsize == 4:
        return GluFwdConfig(32, 64, num_warps=8, num_stages=2)
    if not dot.one_block and features % 16 == 0:
        # At high ranks time goes into reading h and B again for each block.
        return GluFwdConfig(128, 64, num_warps=8, num_stages=2)
    # What takes registers: rows that start at odd addresses, a pointer an element, and the pieces of B.
    return GluFwdConfig(64, 64, num_warps=8 if features % 16 or dot.block_r > 16 else 4, num_stages=2)


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
    scaling: tl.float64, M, N, R,
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
    blocks_n = tl.cdiv(N, BLOCK_N)
    offs_m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    gate = tl.load(addresses(Matrix(gate_ptr, stride_gm, 1), offs_m, offs_n), mask=mask, other=0.0).to(ACC)
    up = tl.load(addresses(Matrix(up_ptr, stride_um, 1), offs_m, offs_n), mask=mask, other=0.0).to(ACC)
    if GLU.in_token_space:
        stride_hm = R if GLU.one_h else 2 * R
        h_gate = Matrix(h_ptr, stride_hm, 1)
        h_up = h_gate if GLU.one_h else Matrix(h_ptr + R, stride_hm, 1)
        h_block = rank_block(h_gate, offs_m, mask_m, 0, R, DOT)
        b_gate, b_up = Matrix(b_gate_ptr, 1, R), Matrix(b_up_ptr, 1, R)
        gate += scaling * lora_dot(h_gate, b_gate, h_block, offs_m, offs_n, mask_m, mask_n, R, DOT)
        if not GLU.one_h:
            h_block = rank_block(h_up, offs_m, mask_m, 0, R, DOT)
        up += scaling * lora_dot(h_up, b_up, h_block, offs_m, offs_n, mask_m, mask_n, R, DOT)
    scale, bias = feature_vectors(scale_ptr, bias_ptr, offs_n, mask_n, GLU, ACC)
    gate = layer_output(gate, scale, bias, GLU)
    scale, bias = feature_vectors(scale_ptr + N, bias_ptr + N, offs_n, mask_n, GLU, ACC)
    up = layer_output(up, scale, bias, GLU)
    # Rounded where a model stores it.
    activated = activation(gate, ACTIVATION).to(a_ptr.dtype.element_ty).to(ACC)
    tl.store(addresses(Matrix(a_ptr, N, 1), offs_m, offs_n), (activated * up).to(a_ptr.dtype.element_ty), mask=mask)


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
    dot = dot_of(R, h.dtype, lora_B[0].dtype, acc=acc, onto=gate.dtype)
    glu = Glu(activation, factors is not None, bias is not None, h.shape[1] == R)
    config = glu_fwd_config(dot, N, gate.element_size())
    _glu_fwd_kernel[(triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)](
        gate, up, h, *lora_B, scale, unused if bias is None else bias, a,
        scaling, M, N, R,
        gate.stride(0), up.stride(0),
        glu, dot, config,
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    return a
