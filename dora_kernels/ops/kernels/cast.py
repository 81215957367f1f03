"""Small factors in the compute dtype: A for h = x Aᵀ, and s B or s g ⊙ B for dh."""

import torch
import triton
import triton.language as tl

from .blocks import offsets_2d
from .launch import TRITON_DTYPES, acc_dtype, signed32
from .rounding import round_to

BLOCK_ROWS, BLOCK_COLUMNS = 16, 128


@triton.jit(do_not_specialize=["salt"])
def _scaled_cast_kernel(
    # pointers
    factor_ptr, scale_ptr, out_ptr,
    # sizes
    scaling: tl.float64, rows, columns, salt,
    # strides
    stride_row, stride_column,
    # constexpr
    ACC: tl.constexpr, HAS_SCALE: tl.constexpr, DTYPE: tl.constexpr, DITHERED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    scaling = tl.cast(scaling, ACC)
    offs_i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_j = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (offs_i < rows)[:, None] & (offs_j < columns)[None, :]
    factor = tl.load(factor_ptr + offsets_2d(offs_i, offs_j, stride_row, stride_column), mask=mask, other=0.0)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + offs_i, mask=offs_i < rows, other=0.0).to(ACC)
        product = factor.to(ACC) * (scale * scaling)[:, None]
    else:
        product = factor.to(ACC) * scaling
    out = round_to(product, offs_i, offs_j, salt, DTYPE, DITHERED)
    tl.store(out_ptr + offsets_2d(offs_i, offs_j, columns, 1), out, mask=mask)


def scaled_cast(
    factor: torch.Tensor,
    dtype: torch.dtype,
    *,
    scale: torch.Tensor | None = None,
    scaling: float = 1.0,
    rounding: str,
    salt: int,
) -> torch.Tensor:
    """`scaling` · `scale` ⊙ `factor` [rows, columns] as `dtype`, `scale` [rows] or 1; in fp32, rounded once."""
    rows, columns = factor.shape
    out = torch.empty(rows, columns, dtype=dtype, device=factor.device)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))
    _scaled_cast_kernel[grid](
        factor, factor if scale is None else scale, out,
        scaling, rows, columns, signed32(salt),
        *factor.stride(),
        TRITON_DTYPES[acc_dtype(factor.dtype, dtype)], scale is not None, TRITON_DTYPES[dtype],
        rounding == "dithered", BLOCK_ROWS, BLOCK_COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return out
