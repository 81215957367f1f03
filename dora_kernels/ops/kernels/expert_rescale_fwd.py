"""The epilogue y = g ⊙ (z + s h Bᵀ) + b with each token's own expert's g, B and b: one read of z, one store of y."""

import torch
import triton
import triton.language as tl

from ..types import Rounding
from .blocks import Matrix, addresses
from .expert_tiles import most_tiles, rows_of_tile
from .launch import ALL_REGISTERS, cdiv, contiguous, dot_of, next_power_of_2, signed32
from .lora_dot import lora_dot, rank_block
from .rescale_fwd import rescale_fwd_config
from .rounding import round_to


@triton.jit(do_not_specialize=["salt"])
def _expert_rescale_fwd_kernel(
    # pointers
    z_ptr, h_ptr, b_ptr, scale_ptr, bias_ptr, ends_ptr, y_ptr,
    # sizes
    scaling: tl.float64, N, R, E, salt,
    # strides
    stride_zm, stride_zn,
    # constexpr
    HAS_BIAS: tl.constexpr, DITHERED: tl.constexpr, DOT: tl.constexpr, CONFIG: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    ACC: tl.constexpr = DOT.acc
    scaling = tl.cast(scaling, ACC)
    blocks_n = tl.cdiv(N, BLOCK_N)
    expert, start, first, end = rows_of_tile(ends_ptr, tl.program_id(0) // blocks_n, E, BLOCK_M, BLOCK_E)
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < end, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    base = tl.load(addresses(Matrix(z_ptr, stride_zm, stride_zn), offs_m, offs_n), mask=mask, other=0.0)
    wide = tl.cast(expert, tl.int64)
    h = Matrix(h_ptr, R, 1)
    h_block = rank_block(h, offs_m, mask_m, 0, R, DOT)
    b = Matrix(b_ptr + wide * N * R, 1, R)
    product = lora_dot(h, b, h_block, offs_m, offs_n, mask_m, mask_n, R, DOT)
    scale = tl.load(scale_ptr + wide * N + offs_n, mask=mask_n, other=0.0)
    y = scale[None, :] * (base.to(ACC) + scaling * product)
    if HAS_BIAS:
        y += tl.load(bias_ptr + wide * N + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    y = round_to(y, offs_m - start, offs_n, salt + expert, y_ptr.dtype.element_ty, DITHERED)
    tl.store(addresses(Matrix(y_ptr, N, 1), offs_m, offs_n), y, mask=mask)


def expert_rescale_fwd(
    base_out: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    mag_norm_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    ends: torch.Tensor,
    *,
    in_place: bool,
    rounding: Rounding,
) -> torch.Tensor:
    """Twin of `reference.expert_rescale_fwd`."""
    (S, N), (E, _, R) = base_out.shape, lora_B.shape
    h, lora_B, bias = contiguous(h), contiguous(lora_B), contiguous(bias)
    in_place = in_place and base_out.is_contiguous()
    out = base_out if in_place else torch.empty(S, N, dtype=base_out.dtype, device=base_out.device)
    if out.numel() == 0:
        return out
    dot = dot_of(R, h.dtype, lora_B.dtype, acc=mag_norm_scale.dtype, onto=base_out.dtype)
    config = rescale_fwd_config(dot, N, base_out.element_size(), False)
    _expert_rescale_fwd_kernel[(most_tiles(S, E, config.block_m) * cdiv(N, config.block_n),)](
        base_out, h, lora_B, mag_norm_scale, mag_norm_scale if bias is None else bias, ends, out,
        scaling, N, R, E, signed32(rounding.salt),
        *base_out.stride(),
        bias is not None, rounding.mode == "dithered", dot, config, next_power_of_2(E),
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    return out
