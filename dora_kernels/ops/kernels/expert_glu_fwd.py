"""a = act(gate) ⊙ up of tokens sorted by expert, with each token's own expert's g and B: one read of z, one store of a.

N are the features of gate, and of up: z [S, 2 N] and B [E, 2 N, R] hold gate's before up's.
"""

import torch
import triton
import triton.language as tl

from ..gpus import gpu_of
from .activations import activation
from .blocks import Matrix, addresses
from .expert_tiles import most_tiles, rows_of_tile
from .glu_fwd import glu_fwd_config
from .launch import ALL_REGISTERS, cdiv, contiguous, dot_of, next_power_of_2
from .lora_dot import lora_dot, rank_block


@triton.jit
def gate_and_up(
    z_ptr, h_ptr, b_ptr, scale_ptr, scaling, expert, offs_m, offs_n, mask_m, mask_n, N, R, DOT: tl.constexpr
):
    """g ⊙ (z + s h Bᵀ) of gate and of up, with the expert's g and B."""
    wide = tl.cast(expert, tl.int64) * (2 * N)
    z, h = Matrix(z_ptr, 2 * N, 1), Matrix(h_ptr, R, 1)
    mask = mask_m[:, None] & mask_n[None, :]
    gate = tl.load(addresses(z, offs_m, offs_n), mask=mask, other=0.0).to(DOT.acc)
    up = tl.load(addresses(z, offs_m, offs_n + N), mask=mask, other=0.0).to(DOT.acc)
    h_block = rank_block(h, offs_m, mask_m, 0, R, DOT)
    b_gate, b_up = Matrix(b_ptr + wide * R, 1, R), Matrix(b_ptr + (wide + N) * R, 1, R)
    gate += scaling * lora_dot(h, b_gate, h_block, offs_m, offs_n, mask_m, mask_n, R, DOT)
    up += scaling * lora_dot(h, b_up, h_block, offs_m, offs_n, mask_m, mask_n, R, DOT)
    gate *= tl.load(scale_ptr + wide + offs_n, mask=mask_n, other=0.0)[None, :]
    up *= tl.load(scale_ptr + wide + N + offs_n, mask=mask_n, other=0.0)[None, :]
    return gate, up


@triton.jit
def _expert_glu_fwd_kernel(
    # pointers
    z_ptr, h_ptr, b_ptr, scale_ptr, ends_ptr, a_ptr,
    # sizes
    scaling: tl.float64, N, R, E,
    # constexpr
    ACTIVATION: tl.constexpr, DOT: tl.constexpr, CONFIG: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    ACC: tl.constexpr = DOT.acc
    scaling = tl.cast(scaling, ACC)
    blocks_n = tl.cdiv(N, BLOCK_N)
    expert, _, first, end = rows_of_tile(ends_ptr, tl.program_id(0) // blocks_n, E, BLOCK_M, BLOCK_E)
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < end, offs_n < N
    gate, up = gate_and_up(
        z_ptr, h_ptr, b_ptr, scale_ptr, scaling, expert, offs_m, offs_n, mask_m, mask_n, N, R, DOT
    )  # fmt: skip
    # Rounded where a model stores it.
    activated = activation(gate, ACTIVATION).to(a_ptr.dtype.element_ty).to(ACC)
    a = (activated * up).to(a_ptr.dtype.element_ty)
    tl.store(addresses(Matrix(a_ptr, N, 1), offs_m, offs_n), a, mask=mask_m[:, None] & mask_n[None, :])


def expert_glu_fwd(
    base_out: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    mag_norm_scale: torch.Tensor,
    scaling: float,
    ends: torch.Tensor,
    *,
    activation: str,
) -> torch.Tensor:
    """Twin of `reference.expert_glu_fwd`."""
    S, (E, both, R) = base_out.shape[0], lora_B.shape
    N = both // 2
    base_out, h, lora_B = contiguous(base_out), contiguous(h), contiguous(lora_B)
    a = torch.empty(S, N, dtype=base_out.dtype, device=base_out.device)
    if a.numel() == 0:
        return a
    dot = dot_of(R, h.dtype, lora_B.dtype, acc=mag_norm_scale.dtype, onto=base_out.dtype)
    config = glu_fwd_config(dot, N, base_out.dtype, has_room=gpu_of(base_out).has_wgmma)
    _expert_glu_fwd_kernel[(most_tiles(S, E, config.block_m) * cdiv(N, config.block_n),)](
        base_out, h, lora_B, mag_norm_scale, ends, a,
        scaling, N, R, E,
        activation, dot, config, next_power_of_2(E),
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    return a
