"""The token-space epilogue y = g ⊙ (z + s h Bᵀ) + b: one read of z, one store of y."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .blocks import lora_dot, offsets_2d, rank_block_of
from .launch import precision_of, rank_block, signed32
from .rounding import round_to


class RescaleFwdConfig(NamedTuple):
    """Launch data."""

    block_m: int
    block_n: int
    block_r: int
    num_warps: int
    num_stages: int


def rescale_fwd_config(rank: int, itemsize: int, stored_itemsize: int, factor_itemsize: int) -> RescaleFwdConfig:
    """By rank and the sizes of the accumulator, of what is stored, and of the wider of h and B."""
    block_r = rank_block(rank, itemsize)
    if itemsize == 8:
        block_m, block_n = 32, 32
    else:
        # fp32 values take twice the registers: 64 tokens of them spill at ranks that 16 does not divide.
        narrow = stored_itemsize == 4 or (factor_itemsize == 4 and rank > block_r)
        block_m, block_n = 32 if narrow else 64, 64
    return RescaleFwdConfig(block_m, block_n, block_r, num_warps=8, num_stages=2)


@triton.jit(do_not_specialize=["salt"])
def _rescale_fwd_kernel(
    # pointers
    z_ptr, h_ptr, b_ptr, scale_ptr, bias_ptr, undropped_ptr, y_ptr,
    # sizes
    scaling: tl.float64, M, N, R, salt,
    # strides
    stride_zm, stride_zn, stride_hm, stride_hr, stride_bn, stride_br, stride_bias, stride_um, stride_un,
    stride_ym, stride_yn,
    # constexpr
    ACC: tl.constexpr, DOT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, BASE_HAS_BIAS: tl.constexpr, HAS_UNDROPPED: tl.constexpr,
    DITHERED: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    scaling = tl.cast(scaling, ACC)
    blocks_n = tl.cdiv(N, BLOCK_N)
    offs_m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    base = tl.load(z_ptr + offsets_2d(offs_m, offs_n, stride_zm, stride_zn), mask=mask, other=0.0)
    first = rank_block_of(h_ptr, offs_m, mask_m, 0, R, stride_hm, stride_hr, BLOCK_R)
    product = lora_dot(
        h_ptr, b_ptr, first, offs_m, offs_n, mask_m, mask_n, R,
        stride_hm, stride_hr, stride_br, stride_bn,
        ACC, DOT, INPUT_PRECISION, ONE_BLOCK, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    base = base.to(ACC)
    scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
    if HAS_BIAS or BASE_HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(ACC)[None, :]
    if HAS_UNDROPPED or BASE_HAS_BIAS:
        if HAS_UNDROPPED:
            undropped = tl.load(undropped_ptr + offsets_2d(offs_m, offs_n, stride_um, stride_un), mask=mask, other=0.0)
            y = undropped.to(ACC)
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
    tl.store(y_ptr + offsets_2d(offs_m, offs_n, stride_ym, stride_yn), y, mask=mask)


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
    rounding: str,
    salt: int,
) -> torch.Tensor:
    """y [M, N] in `base_out`'s dtype from z = `base_out` [M, N], h [M, R], B [N, R], g [N], b [N].

    `in_place` writes y over z. `undropped` is PEFT's dropout: z is then the product of the dropped input, and
    y = undropped + (g − 1) ⊙ z + g ⊙ s h Bᵀ + b. `base_bias` [N] is a bias that `base_out` holds already: by the same
    formula, `base_out` being the undropped product and z what is left of it without the bias.
    """
    (M, N), R = base_out.shape, lora_B.shape[1]
    out = base_out if in_place else torch.empty(M, N, dtype=base_out.dtype, device=base_out.device)
    if out.numel() == 0:
        return out
    dtype = mag_norm_scale.dtype
    factor_itemsize = max(h.element_size(), lora_B.element_size())
    config = rescale_fwd_config(R, dtype.itemsize, base_out.element_size(), factor_itemsize)
    other = base_out if undropped is None else undropped
    any_bias = bias if base_bias is None else base_bias
    _rescale_fwd_kernel[(triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)](
        base_out, h, lora_B, mag_norm_scale, mag_norm_scale if any_bias is None else any_bias, other, out,
        scaling, M, N, R, signed32(salt),
        *base_out.stride(), *h.stride(), *lora_B.stride(), 1 if any_bias is None else any_bias.stride(0),
        *other.stride(), *out.stride(),
        *precision_of(h.dtype, lora_B.dtype, acc=dtype),
        bias is not None, base_bias is not None, undropped is not None,
        rounding == "dithered", R <= config.block_r, config.block_m, config.block_n, config.block_r,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
