"""Blocks of matrices in memory, and products over the rank."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Matrix(NamedTuple):
    """A matrix in memory, as a kernel sees it."""

    ptr: Any
    stride_row: Any
    stride_column: Any


class Dot(NamedTuple):
    """How a product over the rank is computed; `launch.dot_of` chooses."""

    acc: tl.dtype  # of the accumulator
    operand: tl.dtype  # of both factors inside the product
    input_precision: str  # of fp32 factors
    block_r: int  # the rank is walked in blocks of this size
    one_block: bool  # the first block holds the whole rank


@triton.jit
def offsets_2d(rows, columns, stride_row, stride_column):
    """int64 offsets [len(rows), len(columns)]: M·N and N·K pass 2³¹ at real sizes."""
    return rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column


@triton.jit
def addresses(matrix, rows, columns):
    """Pointers [len(rows), len(columns)] into a `Matrix`."""
    return matrix.ptr + offsets_2d(rows, columns, matrix.stride_row, matrix.stride_column)


@triton.jit
def rank_block(left, offs_i, mask_i, start, R, DOT: tl.constexpr):
    """Columns start … start + block_r of a factor [I, R]: [len(offs_i), block_r]."""
    offs_r = start + tl.arange(0, DOT.block_r)
    mask = mask_i[:, None] & (offs_r < R)[None, :]
    return tl.load(addresses(left, offs_i, offs_r), mask=mask, other=0.0)


@triton.jit
def lora_dot(left, right, left_block, offs_i, offs_j, mask_i, mask_j, R, DOT: tl.constexpr):
    """left [I, R] · right [R, J] -> [len(offs_i), len(offs_j)] in `DOT.acc`.

    `left_block` is left's first block of the rank. Where it holds the whole rank nothing loops in here, and the
    compiler pipelines the caller's loop, the innermost one.
    """
    ACC: tl.constexpr = DOT.acc
    OPERAND: tl.constexpr = DOT.operand
    PRECISION: tl.constexpr = DOT.input_precision
    if DOT.one_block:
        offs_r = tl.arange(0, DOT.block_r)
        mask = (offs_r < R)[:, None] & mask_j[None, :]
        right_block = tl.load(addresses(right, offs_r, offs_j), mask=mask, other=0.0)  # [block_r, len(offs_j)]
        product = tl.dot(left_block.to(OPERAND), right_block.to(OPERAND), input_precision=PRECISION, out_dtype=ACC)
    else:
        BLOCK_I: tl.constexpr = offs_i.shape[0]
        BLOCK_J: tl.constexpr = offs_j.shape[0]
        product = tl.zeros([BLOCK_I, BLOCK_J], dtype=ACC)
        for start in range(0, R, DOT.block_r):
            offs_r = start + tl.arange(0, DOT.block_r)
            mask = (offs_r < R)[:, None] & mask_j[None, :]
            left_part = rank_block(left, offs_i, mask_i, start, R, DOT)
            right_part = tl.load(addresses(right, offs_r, offs_j), mask=mask, other=0.0)
            product = tl.dot(
                left_part.to(OPERAND), right_part.to(OPERAND), product, input_precision=PRECISION, out_dtype=ACC
            )
    return product
