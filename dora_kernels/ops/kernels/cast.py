"""Small factors in the compute dtype: A for h = x Aᵀ, and s B or s g ⊙ B for dh."""

import torch
import triton
import triton.language as tl

from ..types import Rounding
from .blocks import Matrix, addresses
from .launch import TRITON_DTYPES, acc_dtype, cdiv, signed32
from .rounding import round_to

BLOCK_ROWS, BLOCK_COLUMNS = 16, 128


@triton.jit
def cast_strips(
    a, cast, program, programs, K, R, salt, BLOCK_K: tl.constexpr, DOT: tl.constexpr, DITHERED: tl.constexpr
):
    """A [R, K] rounded into `cast`, its columns dealt out over `programs`."""
    DTYPE: tl.constexpr = cast.ptr.dtype.element_ty
    for start in range(program * BLOCK_K, K, programs * BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        for start_r in range(0, R, DOT.block_r):
            offs_r = start_r + tl.arange(0, DOT.block_r)
            mask = (offs_r < R)[:, None] & (offs_k < K)[None, :]
            factor = tl.load(addresses(a, offs_r, offs_k), mask=mask, other=0.0).to(DOT.acc)
            rounded = round_to(factor, offs_r, offs_k, salt, DTYPE, DITHERED)
            tl.store(addresses(cast, offs_r, offs_k), rounded, mask=mask)


@triton.jit(do_not_specialize=["salt"])
def _scaled_cast_kernel(
    # pointers
    factor_ptr, scale_ptr, out_ptr,
    # sizes
    scaling: tl.float64, rows, columns, salt,
    # strides
    stride_row, stride_column,
    # constexpr
    ACC: tl.constexpr, HAS_SCALE: tl.constexpr, DITHERED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    scaling = tl.cast(scaling, ACC)
    offs_i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_j = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (offs_i < rows)[:, None] & (offs_j < columns)[None, :]
    factor = tl.load(addresses(Matrix(factor_ptr, stride_row, stride_column), offs_i, offs_j), mask=mask, other=0.0)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + offs_i, mask=offs_i < rows, other=0.0).to(ACC)
        product = factor.to(ACC) * (scale * scaling)[:, None]
    else:
        product = factor.to(ACC) * scaling
    out = round_to(product, offs_i, offs_j, salt, out_ptr.dtype.element_ty, DITHERED)
    tl.store(addresses(Matrix(out_ptr, columns, 1), offs_i, offs_j), out, mask=mask)


def scaled_cast(
    factor: torch.Tensor,
    dtype: torch.dtype,
    *,
    scale: torch.Tensor | None = None,
    scaling: float | None = None,
    rounding: Rounding,
) -> torch.Tensor:
    """Twin of `reference.scaled_cast`."""
    rows, columns = factor.shape
    out = torch.empty(rows, columns, dtype=dtype, device=factor.device)
    if out.numel() == 0:
        return out
    grid = (cdiv(rows, BLOCK_ROWS), cdiv(columns, BLOCK_COLUMNS))
    _scaled_cast_kernel[grid](
        factor, factor if scale is None else scale, out,
        1.0 if scaling is None else scaling, rows, columns, signed32(rounding.salt),
        *factor.stride(),
        TRITON_DTYPES[acc_dtype(factor.dtype, dtype)], scale is not None, rounding.mode == "dithered",
        BLOCK_ROWS, BLOCK_COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return out
