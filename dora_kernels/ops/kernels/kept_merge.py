"""W' as it was kept, where A, B and m are bit for bit those that it is of; else merged anew, in the same memory.

The launch is made in either case: the answer of the comparison stays on the device, and the host does not wait for it.
"""

import torch
import triton
import triton.language as tl

from ..base_weights import Packed, stored_rounding
from ..types import NormScale, Rounding
from .base_weight import WeightMemory, adapted_block, weight_arguments
from .blocks import Matrix, addresses
from .kept_norm import has_changed
from .launch import ALL_REGISTERS, cdiv, contiguous, signed32
from .lora_dot import rank_block
from .merge import merge_launch
from .rounding import round_to


@triton.jit(do_not_specialize=["salt"])
def _kept_merge_kernel(
    # pointers and strides
    w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, stride_wn, stride_wk,
    a_ptr, b_ptr, merged_ptr, scale_ptr, changed_ptr,
    # sizes
    scaling: tl.float64, N, K, R, salt,
    # constexpr
    DITHERED: tl.constexpr, FORMAT: tl.constexpr, DOT: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_K: tl.constexpr = CONFIG.block_k
    scaling = tl.cast(scaling, DOT.acc)
    if has_changed(changed_ptr):
        w = WeightMemory(
            w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, stride_wn, stride_wk
        )
        a, b = Matrix(a_ptr, K, 1), Matrix(b_ptr, R, 1)
        blocks_k = tl.cdiv(K, BLOCK_K)
        offs_n = tl.program_id(0) // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
        start_k = tl.program_id(0) % blocks_k * BLOCK_K
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask_n = offs_n < N
        b_block = rank_block(b, offs_n, mask_n, 0, R, DOT)
        v = adapted_block(w, a, b, b_block, scaling, offs_n, start_k, N, K, R, FORMAT, DOT, BLOCK_K)
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
        merged = round_to(v * scale[:, None], offs_n, offs_k, salt, merged_ptr.dtype.element_ty, DITHERED)
        mask = mask_n[:, None] & (offs_k < K)[None, :]
        tl.store(addresses(Matrix(merged_ptr, K, 1), offs_n, offs_k), merged, mask=mask)


def kept_merge(
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    *,
    rounding: Rounding,
    norm_scale: NormScale,
    changed: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Twin of `reference.kept_merge`."""
    (N, K), R = weight.shape, lora_A.shape[0]
    if not out.numel():
        return
    lora_A, lora_B = contiguous(lora_A), contiguous(lora_B)
    w, weight_format = weight_arguments(weight)
    dot, config = merge_launch(weight, weight_format, lora_A, lora_B, norm_scale.scale.dtype, out.dtype)
    dithered = stored_rounding(weight, rounding.mode) == "dithered"
    _kept_merge_kernel[(cdiv(N, config.block_n) * cdiv(K, config.block_k),)](
        *w, lora_A, lora_B, out, norm_scale.scale, changed,
        scaling, N, K, R, signed32(rounding.salt), dithered, weight_format, dot, config,
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
