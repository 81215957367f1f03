"""Blocks of matrices in memory."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Matrix(NamedTuple):
    """A matrix in memory, as a kernel sees it."""

    ptr: Any
    stride_row: Any
    stride_column: Any


@triton.jit
def offsets_2d(rows, columns, stride_row, stride_column):
    """int64 offsets [len(rows), len(columns)]: M·N and N·K pass 2³¹ at real sizes."""
    return rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column


@triton.jit
def addresses(matrix, rows, columns):
    """Pointers [len(rows), len(columns)] into a `Matrix`."""
    return matrix.ptr + offsets_2d(rows, columns, matrix.stride_row, matrix.stride_column)
