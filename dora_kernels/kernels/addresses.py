"""Offsets of a two-dimensional block in memory."""

import triton
import triton.language as tl


@triton.jit
def offsets_2d(rows, columns, stride_row, stride_column):
    """int64 offsets [len(rows), len(columns)]: M·N and N·K pass 2³¹ at real sizes."""
    return rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
