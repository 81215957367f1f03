"""Blocks of an FP4 weight W [N, K], decoded as they are read: see `ops/base_weights/fp4.py` for how codes lie."""

import triton
import triton.language as tl

from .blocks import Matrix, addresses
from .floats import from_e2m1, from_e4m3, from_e8m0
from .int4 import group_count


@triton.jit
def fp4_scales(w, offs_n, groups, mask, K, FORMAT: tl.constexpr):
    """Scales in fp32 [len(offs_n), len(groups)]."""
    bytes = tl.load(addresses(Matrix(w.absmax, group_count(K, FORMAT), 1), offs_n, groups), mask=mask, other=0)
    if FORMAT.fp4 == "e8m0":
        scales = from_e8m0(bytes)
    elif FORMAT.fp4 == "e4m3":
        scales = from_e4m3(bytes.to(tl.int32))
    elif FORMAT.fp4 == "e4m3 times":
        scales = from_e4m3(bytes.to(tl.int32)) * tl.load(w.code)
    else:
        # The library's own division, to the last bit.
        scales = tl.div_rn(from_e4m3(bytes.to(tl.int32)), tl.load(w.code))
    return scales


@triton.jit
def fp4_block(w, offs_n, start_k, N, K, FORMAT: tl.constexpr, BLOCK_K: tl.constexpr):
    """W [len(offs_n), BLOCK_K] from column `start_k` on, zero outside [N, K]. Groups divide BLOCK_K."""
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    GROUPS: tl.constexpr = BLOCK_K // FORMAT.group
    mask_n = offs_n < N
    # Written so that the compiler sees what divides these offsets, and reads 16 bytes at a time.
    offs_byte = start_k // BLOCK_K * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    mask = mask_n[:, None] & (offs_byte < w.stride_n)[None, :]
    pairs = tl.load(addresses(Matrix(w.data, w.stride_n, 1), offs_n, offs_byte), mask=mask, other=0).to(tl.int32)
    groups = start_k // BLOCK_K * GROUPS + tl.arange(0, GROUPS)
    mask = mask_n[:, None] & (groups < group_count(K, FORMAT))[None, :]
    scales = fp4_scales(w, offs_n, groups, mask, K, FORMAT)
    scales = tl.broadcast_to(scales[:, :, None], [BLOCK_N, GROUPS, FORMAT.group // 2])
    scales = tl.reshape(scales, [BLOCK_N, BLOCK_K // 2])
    block = tl.interleave(from_e2m1(pairs) * scales, from_e2m1(pairs >> 4) * scales)
    offs_k = start_k + tl.arange(0, BLOCK_K)
    return tl.where(mask_n[:, None] & (offs_k < K)[None, :], block, 0.0).to(FORMAT.dtype)
