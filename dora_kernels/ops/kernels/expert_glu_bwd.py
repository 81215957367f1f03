"""The gradients of what gate and up return, of da and of tokens sorted by expert: one read of da and z, one store."""

import torch
import triton
import triton.language as tl

from ..gpus import gpu_of
from .activations import activation, derivative
from .blocks import Matrix, addresses
from .expert_glu_fwd import gate_and_up
from .expert_tiles import most_tiles, rows_of_tile
from .glu_bwd import glu_bwd_config
from .launch import ALL_REGISTERS, cdiv, contiguous, dot_of, next_power_of_2


@triton.jit
def _expert_glu_bwd_kernel(
    # pointers
    grad_a_ptr, z_ptr, h_ptr, b_ptr, scale_ptr, ends_ptr, grads_ptr,
    # sizes
    scaling: tl.float64, N, R, E,
    # strides
    stride_am, stride_an,
    # constexpr
    ACTIVATION: tl.constexpr, DOT: tl.constexpr, CONFIG: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    ACC: tl.constexpr = DOT.acc
    DTYPE: tl.constexpr = grads_ptr.dtype.element_ty
    scaling = tl.cast(scaling, ACC)
    blocks_n = tl.cdiv(N, BLOCK_N)
    expert, _, first, end = rows_of_tile(ends_ptr, tl.program_id(0) // blocks_n, E, BLOCK_M, BLOCK_E)
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < end, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    gate, up = gate_and_up(
        z_ptr, h_ptr, b_ptr, scale_ptr, scaling, expert, offs_m, offs_n, mask_m, mask_n, N, R, DOT
    )  # fmt: skip
    grad = tl.load(addresses(Matrix(grad_a_ptr, stride_am, stride_an), offs_m, offs_n), mask=mask, other=0.0).to(ACC)
    # Rounded as in forward.
    activated = activation(gate, ACTIVATION).to(DTYPE).to(ACC)
    grads = addresses(Matrix(grads_ptr, 2 * N, 1), offs_m, offs_n)
    tl.store(grads, (grad * up * derivative(gate, ACTIVATION)).to(DTYPE), mask=mask)
    tl.store(grads + N, (grad * activated).to(DTYPE), mask=mask)


def expert_glu_bwd(
    grad_a: torch.Tensor,
    base_out: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    mag_norm_scale: torch.Tensor,
    scaling: float,
    ends: torch.Tensor,
    *,
    activation: str,
) -> torch.Tensor:
    """Twin of `reference.expert_glu_bwd`."""
    S, (E, both, R) = base_out.shape[0], lora_B.shape
    N = both // 2
    base_out, h, lora_B = contiguous(base_out), contiguous(h), contiguous(lora_B)
    grads = torch.empty(S, both, dtype=base_out.dtype, device=base_out.device)
    if grads.numel() == 0:
        return grads
    dot = dot_of(R, h.dtype, lora_B.dtype, acc=mag_norm_scale.dtype, onto=base_out.dtype)
    config = glu_bwd_config(dot, N, base_out.dtype, has_room=gpu_of(base_out).has_wgmma)
    _expert_glu_bwd_kernel[(most_tiles(S, E, config.block_m) * cdiv(N, config.block_n),)](
        grad_a, base_out, h, lora_B, mag_norm_scale, ends, grads,
        scaling, N, R, E,
        *grad_a.stride(),
        activation, dot, config, next_power_of_2(E),
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    return grads
