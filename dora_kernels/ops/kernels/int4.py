"""Blocks of an int4 weight W [N, K], decoded as they are read: see `ops/base_weights/int4.py` for how codes lie."""

import triton
import triton.language as tl

from .blocks import Matrix, addresses


@triton.jit
def nibbles_of(words, index, FORMAT: tl.constexpr):
    """Of each word the code of element `index` of eight."""
    place = index % 8
    if FORMAT.interleaved:
        place = place // 2 + place % 2 * 4
    return (words >> (4 * place)) & 15


@triton.jit
def group_count(K, FORMAT: tl.constexpr):
    """K / group, so that the compiler sees what divides it."""
    UNIT: tl.constexpr = FORMAT.group_unit
    return K // (FORMAT.group * UNIT) * UNIT


@triton.jit
def int4_group(w, offs_n, groups, mask, N, K, FORMAT: tl.constexpr):
    """Scales in fp32, 0 where masked, and zeros, of output features `offs_n` in `groups` [any, len(offs_n) or 1]."""
    COUNT = 1 if FORMAT.group == 0 else group_count(K, FORMAT)
    rows, groups = offs_n.to(tl.int64)[:, None], groups.to(tl.int64)
    if FORMAT.rows_are_outputs:
        offs_scale, offs_zero = rows * COUNT + groups, rows // 8 * COUNT + groups
    else:
        offs_scale, offs_zero = groups * N + rows, groups * tl.cdiv(N, 8) + rows // 8
    scales = tl.load(w.absmax + offs_scale, mask=mask, other=0.0).to(tl.float32)
    if FORMAT.has_zeros:
        zeros = nibbles_of(tl.load(w.code + offs_zero, mask=mask, other=0), offs_n[:, None], FORMAT)
    else:
        zeros = tl.full(scales.shape, 8, tl.int32)
    return scales, zeros


@triton.jit
def int4_block(w, offs_n, start_k, N, K, FORMAT: tl.constexpr, BLOCK_K: tl.constexpr):
    """W [len(offs_n), BLOCK_K] from column `start_k` on, zero outside [N, K]."""
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    GROUP: tl.constexpr = FORMAT.group
    offs_k = start_k + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    memory = Matrix(w.data, w.stride_n, w.stride_k)
    if FORMAT.words_along_outputs:
        offs_word = tl.min(tl.reshape(offs_n, [BLOCK_N // 8, 8]), axis=1) // 8
        mask = (offs_word < tl.cdiv(N, 8))[:, None] & (offs_k < K)[None, :]
        words = tl.load(addresses(memory, offs_word, offs_k), mask=mask, other=0)
        codes = nibbles_of(words[:, None, :], tl.arange(0, 8)[None, :, None], FORMAT)
    else:
        # Written so that the compiler sees what divides these offsets, and reads 16 bytes at a time.
        offs_word = start_k // BLOCK_K * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        mask = mask_n[:, None] & (offs_word < tl.cdiv(K, 8))[None, :]
        words = tl.load(addresses(memory, offs_n, offs_word), mask=mask, other=0)
        codes = nibbles_of(words[:, :, None], tl.arange(0, 8)[None, None, :], FORMAT)
    codes = tl.reshape(codes, [BLOCK_N, BLOCK_K])
    if not FORMAT.has_groups and GROUP % BLOCK_K == 0:  # one scale for a block's every row
        group = 0 if GROUP == 0 else start_k // GROUP
        scales, zeros = int4_group(w, offs_n, tl.full([1, 1], 0, tl.int32) + group, mask_n[:, None], N, K, FORMAT)
    elif not FORMAT.has_groups and BLOCK_K % GROUP == 0:
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        groups = start_k // BLOCK_K * GROUPS + tl.arange(0, GROUPS)
        mask = mask_n[:, None] & (groups < group_count(K, FORMAT))[None, :]
        scales, zeros = int4_group(w, offs_n, groups[None, :], mask, N, K, FORMAT)
        scales = tl.reshape(tl.broadcast_to(scales[:, :, None], [BLOCK_N, GROUPS, GROUP]), [BLOCK_N, BLOCK_K])
        zeros = tl.reshape(tl.broadcast_to(zeros[:, :, None], [BLOCK_N, GROUPS, GROUP]), [BLOCK_N, BLOCK_K])
    else:
        groups = offs_k // GROUP if GROUP > 0 else offs_k * 0
        if FORMAT.has_groups:
            groups = tl.load(w.nested_absmax + offs_k, mask=offs_k < K, other=0)
        mask = mask_n[:, None] & (offs_k < K)[None, :]
        scales, zeros = int4_group(w, offs_n, groups[None, :], mask, N, K, FORMAT)
    # Behind the mantissa of 2²³ a code is that number plus 2²³, exactly: cheaper than a conversion.
    numbers = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (zeros + 8388608).to(tl.float32)
    return tl.where((offs_k < K)[None, :], numbers * scales, 0.0).to(FORMAT.dtype)
