"""Blocks of an FP8 weight W [N, K], decoded as they are read: see `ops/base_weights/fp8.py` for how scales lie."""

import triton
import triton.language as tl

from .blocks import Matrix, addresses, offsets_2d
from .floats import from_e4m3


@triton.jit
def fp8_block(w, offs_n, start_k, N, K, FORMAT: tl.constexpr, BLOCK_K: tl.constexpr):
    """W [len(offs_n), BLOCK_K] from column `start_k` on, zero outside [N, K]."""
    offs_k = start_k + tl.arange(0, BLOCK_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    codes = tl.load(addresses(Matrix(w.data, w.stride_n, w.stride_k), offs_n, offs_k), mask=mask, other=0).to(tl.int32)
    values = from_e4m3(codes)
    row = offs_n * 0 if FORMAT.scale_rows == 0 else offs_n // FORMAT.scale_rows
    WIDTH: tl.constexpr = FORMAT.scale_columns
    if WIDTH == 0:
        scales = tl.load(w.absmax + row, mask=offs_n < N, other=0.0)[:, None]
    elif WIDTH % BLOCK_K == 0:  # one scale for a block's every row
        scales = tl.load(w.absmax + row * tl.cdiv(K, WIDTH) + start_k // WIDTH, mask=offs_n < N, other=0.0)[:, None]
    else:
        scales = tl.load(w.absmax + offsets_2d(row, offs_k // WIDTH, tl.cdiv(K, WIDTH), 1), mask=mask, other=0.0)
    return values * scales
