"""The token-space epilogue y = g ⊙ (z + s h Bᵀ) + b: one read of z, one store of y."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..gpus import gpu_of
from ..types import Rounding
from .blocks import Matrix, addresses
from .launch import ALL_REGISTERS, cdiv, contiguous, contiguous_rows, dot_of, rank_blocks, signed32
from .lora_dot import Dot, lora_dot, rank_block
from .rounding import round_to


class RescaleFwdConfig(NamedTuple):
    """Launch data."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def rescale_fwd_config(dot: Dot, out_features: int, stored_itemsize: int, has_undropped: bool) -> RescaleFwdConfig:
    """By product, whether rows start at aligned addresses, and how much of the outputs is held in registers."""
    if dot.acc == tl.float64:
        return RescaleFwdConfig(32, 32, num_warps=8, num_stages=2)
    if dot.is_16_bit:
        if out_features % 16:
            # Each value read alone has an address of its own: larger blocks spill.
            return RescaleFwdConfig(64 if dot.one_block else 32, 64, num_warps=8, num_stages=2)
        # At high ranks time goes into reading h and B again for each block. Two blocks of rank 64 at once spilled.
        block_m, num_warps = (64, 4) if dot.one_block and dot.block_r <= 32 else (128, 8)
        return RescaleFwdConfig(block_m, 64 if has_undropped else 128, num_warps, 1 if dot.block_r == 64 else 2)
    # fp32 values take twice the registers: 64 tokens of them spill at ranks that 16 does not divide.
    block_m = 32 if stored_itemsize == 4 or not dot.one_block else 64
    return RescaleFwdConfig(block_m, 64, num_warps=8, num_stages=2)


@triton.jit(do_not_specialize=["salt"])
def _rescale_fwd_kernel(
    # pointers
    z_ptr, h_ptr, b_ptr, scale_ptr, bias_ptr, undropped_ptr, y_ptr,
    # sizes
    scaling: tl.float64, M, N, R, salt,
    # strides
    stride_zm, stride_zn, stride_hm, stride_um, stride_un, stride_ym, stride_yn,
    # constexpr
    HAS_BIAS: tl.constexpr, BASE_HAS_BIAS: tl.constexpr, HAS_UNDROPPED: tl.constexpr, DITHERED: tl.constexpr,
    DOT: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    ACC: tl.constexpr = DOT.acc
    scaling = tl.cast(scaling, ACC)
    blocks_n = tl.cdiv(N, BLOCK_N)
    offs_m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    base = tl.load(addresses(Matrix(z_ptr, stride_zm, stride_zn), offs_m, offs_n), mask=mask, other=0.0)
    h = Matrix(h_ptr, stride_hm, 1)
    h_block = rank_block(h, offs_m, mask_m, 0, R, DOT)
    product = lora_dot(h, Matrix(b_ptr, 1, R), h_block, offs_m, offs_n, mask_m, mask_n, R, DOT)
    base = base.to(ACC)
    scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
    if HAS_BIAS or BASE_HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    if HAS_UNDROPPED or BASE_HAS_BIAS:
        if HAS_UNDROPPED:
            undropped = Matrix(undropped_ptr, stride_um, stride_un)
            y = tl.load(addresses(undropped, offs_m, offs_n), mask=mask, other=0.0).to(ACC)
        else:
            y = base
            base -= bias
        # g = 1 and B = 0 leave no trace of z.
        y += (scale - 1.0)[None, :] * base + (scaling * scale)[None, :] * product
    else:
        y = scale[None, :] * (base + scaling * product)
    if HAS_BIAS:
        y += bias
    y = round_to(y, offs_m, offs_n, salt, y_ptr.dtype.element_ty, DITHERED)
    tl.store(addresses(Matrix(y_ptr, stride_ym, stride_yn), offs_m, offs_n), y, mask=mask)


def rescale_fwd(
    base_out: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    mag_norm_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    *,
    base_bias: torch.Tensor | None = None,
    undropped: torch.Tensor | None = None,
    in_place: bool,
    rounding: Rounding,
) -> torch.Tensor:
    """Twin of `reference.rescale_fwd`."""
    (M, N), R = base_out.shape, lora_B.shape[1]
    h, lora_B = contiguous_rows(h), contiguous(lora_B)
    out = base_out if in_place else torch.empty(M, N, dtype=base_out.dtype, device=base_out.device)
    if out.numel() == 0:
        return out
    dtype = mag_norm_scale.dtype
    # Pieces of both factors leave no registers.
    blocks = rank_blocks(gpu_of(base_out), R, N % 16 == 0 and h.dtype == torch.bfloat16)
    dot = dot_of(R, h.dtype, lora_B.dtype, acc=dtype, onto=base_out.dtype, **blocks)
    config = rescale_fwd_config(dot, N, base_out.element_size(), undropped is not None)
    other = base_out if undropped is None else undropped
    any_bias = contiguous(bias if base_bias is None else base_bias)
    _rescale_fwd_kernel[(cdiv(M, config.block_m) * cdiv(N, config.block_n),)](
        base_out, h, lora_B, mag_norm_scale, mag_norm_scale if any_bias is None else any_bias, other, out,
        scaling, M, N, R, signed32(rounding.salt),
        *base_out.stride(), h.stride(0), *other.stride(), *out.stride(),
        bias is not None, base_bias is not None, undropped is not None, rounding.mode == "dithered",
        dot, config,
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    return out
