"""Blocks of matrices in memory, and products over the rank."""

import triton
import triton.language as tl


@triton.jit
def offsets_2d(rows, columns, stride_row, stride_column):
    """int64 offsets [len(rows), len(columns)]: M·N and N·K pass 2³¹ at real sizes."""
    return rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column


@triton.jit
def rank_block_of(ptr, offs_i, mask_i, start, R, stride_i, stride_r, BLOCK_R: tl.constexpr):
    """Columns start … start + BLOCK_R of a factor [I, R]: [len(offs_i), BLOCK_R]."""
    offs_r = start + tl.arange(0, BLOCK_R)
    mask = mask_i[:, None] & (offs_r < R)[None, :]
    return tl.load(ptr + offsets_2d(offs_i, offs_r, stride_i, stride_r), mask=mask, other=0.0)


@triton.jit
def lora_dot(
    left_ptr, right_ptr, first, offs_i, offs_j, mask_i, mask_j, R,
    stride_li, stride_lr, stride_rr, stride_rj,
    ACC: tl.constexpr, DOT: tl.constexpr, INPUT_PRECISION: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """left [I, R] · right [R, J] -> [BLOCK_I, BLOCK_J] in ACC, the rank walked in blocks.

    `first` is left's first block; with ONE_BLOCK it is the only one, and the caller's loop is the innermost, which is
    the one that the compiler pipelines.
    """
    if ONE_BLOCK:
        offs_r = tl.arange(0, BLOCK_R)
        right = tl.load(  # [BLOCK_R, BLOCK_J]
            right_ptr + offsets_2d(offs_r, offs_j, stride_rr, stride_rj),
            mask=(offs_r < R)[:, None] & mask_j[None, :],
            other=0.0,
        )
        product = tl.dot(first.to(DOT), right.to(DOT), input_precision=INPUT_PRECISION, out_dtype=ACC)
    else:
        product = tl.zeros([BLOCK_I, BLOCK_J], dtype=ACC)
        for start in range(0, R, BLOCK_R):
            offs_r = start + tl.arange(0, BLOCK_R)
            left = rank_block_of(left_ptr, offs_i, mask_i, start, R, stride_li, stride_lr, BLOCK_R)
            right = tl.load(
                right_ptr + offsets_2d(offs_r, offs_j, stride_rr, stride_rj),
                mask=(offs_r < R)[:, None] & mask_j[None, :],
                other=0.0,
            )
            product = tl.dot(left.to(DOT), right.to(DOT), product, input_precision=INPUT_PRECISION, out_dtype=ACC)
    return product
