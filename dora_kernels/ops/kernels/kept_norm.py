"""n and g as they were kept, where A, B and m are bit for bit those that they are of; else computed anew, and kept.

Two launches: one compares the factors with their kept content and brings that up to date, one reads its answer. The
host waits for neither.
"""

import torch
import triton
import triton.language as tl

from ..base_weights import Packed
from ..types import KeptNorm, NormScale
from .base_weight import WeightMemory, weight_arguments
from .blocks import Matrix
from .launch import ALL_REGISTERS, cdiv, contiguous
from .weight_norm import empty_norm_scale, norm_and_scale, norm_launch, split_width, sums_of_squares

PROGRAMS = tl.constexpr(256)
"""That compare: each has an answer of its own, which all programs of the norm read."""

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def brought_up_to_date(new_ptr, kept_ptr, size, BLOCK: tl.constexpr):
    """Writes what differs over what was kept, of this program's share; 1 where something did, [BLOCK]."""
    changed = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        offs = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        new = tl.load(new_ptr + offs, mask=offs < size, other=0)
        differs = new != tl.load(kept_ptr + offs, mask=offs < size, other=0)
        tl.store(kept_ptr + offs, new, mask=(offs < size) & differs)
        changed |= differs.to(tl.int32)
    return changed


@triton.jit
def _compare_factors_kernel(
    # pointers
    a_ptr, b_ptr, m_ptr, kept_a_ptr, kept_b_ptr, kept_m_ptr, changed_ptr,
    # sizes
    N, K, R,
    # constexpr
    BLOCK: tl.constexpr,
):  # fmt: skip
    changed = brought_up_to_date(a_ptr, kept_a_ptr, R * K, BLOCK)
    changed |= brought_up_to_date(b_ptr, kept_b_ptr, N * R, BLOCK)
    changed |= brought_up_to_date(m_ptr, kept_m_ptr, N, BLOCK)
    tl.store(changed_ptr + tl.program_id(0), tl.max(changed, axis=0))


@triton.jit
def has_changed(changed_ptr):
    """Whether the comparison found a bit that differs."""
    return tl.max(tl.load(changed_ptr + tl.arange(0, PROGRAMS)), axis=0) > 0


@triton.jit
def _kept_norm_kernel(
    # pointers and strides
    w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, stride_wn, stride_wk,
    a_ptr, b_ptr, m_ptr, norm_ptr, scale_ptr, kept_norm_ptr, kept_scale_ptr, changed_ptr,
    # sizes
    scaling: tl.float64, N, K, R, k_per_split,
    # constexpr
    FORMAT: tl.constexpr, DOT: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = CONFIG.block_n
    SPLITS: tl.constexpr = CONFIG.splits
    ACC: tl.constexpr = DOT.acc
    scaling = tl.cast(scaling, ACC)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if has_changed(changed_ptr):
        w = WeightMemory(
            w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, stride_wn, stride_wk
        )
        a, b = Matrix(a_ptr, K, 1), Matrix(b_ptr, R, 1)
        # The parts that several programs of `weight_norm` square, added as there, to the same bits.
        plain = tl.zeros([BLOCK_N], dtype=ACC)
        large, small = plain, plain
        for split in range(SPLITS):
            start = split * k_per_split
            part, part_large, part_small = sums_of_squares(
                w, a, b, scaling, offs_n, start, tl.minimum(start + k_per_split, K), N, K, R, FORMAT, DOT, CONFIG
            )
            plain += part
            large += part_large
            small += part_small
        magnitude = tl.load(m_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
        norm, scale = norm_and_scale(plain, large, small, magnitude, ACC)
        tl.store(kept_norm_ptr + offs_n, norm, mask=mask_n)
        tl.store(kept_scale_ptr + offs_n, scale, mask=mask_n)
    else:
        norm = tl.load(kept_norm_ptr + offs_n, mask=mask_n, other=0.0)
        scale = tl.load(kept_scale_ptr + offs_n, mask=mask_n, other=0.0)
    tl.store(norm_ptr + offs_n, norm, mask=mask_n)
    tl.store(scale_ptr + offs_n, scale, mask=mask_n)


def kept_norm(
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    kept: KeptNorm,
    *,
    into: NormScale | None = None,
) -> tuple[NormScale, torch.Tensor]:
    """Twin of `reference.kept_norm`."""
    (N, K), R, factors = weight.shape, lora_A.shape[0], [contiguous(part) for part in (lora_A, lora_B, magnitude)]
    norm, scale = empty_norm_scale(weight, *factors) if into is None else into
    if N == 0:
        return NormScale(norm, scale), torch.zeros(PROGRAMS.value, dtype=torch.int32, device=weight.device)
    changed = torch.empty(PROGRAMS.value, dtype=torch.int32, device=weight.device)
    bits = [part.view(INTEGERS[part.element_size()]) for part in (*factors, *kept.factors)]
    _compare_factors_kernel[(PROGRAMS.value,)](*bits, changed, N, K, R, 2048, num_warps=4)
    w, weight_format = weight_arguments(weight)
    dot, config = norm_launch(weight, weight_format, lora_A, lora_B, norm.dtype)
    _kept_norm_kernel[(cdiv(N, config.block_n),)](
        *w, *factors, norm, scale, *kept.norm_scale, changed,
        scaling, N, K, R, split_width(K, config), weight_format, dot, config,
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    return NormScale(norm, scale), changed
