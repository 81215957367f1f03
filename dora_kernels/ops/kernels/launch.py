"""What every launcher needs to know before it launches: types, GPU data, and whether kernels are interpreted."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import rounding

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Precision(NamedTuple):
    """Types inside a kernel: accumulators, the operands of its dots, and how fp32 operands are multiplied."""

    acc: tl.dtype
    dot: tl.dtype
    input_precision: str


def precision_of(*factors: torch.dtype, acc: torch.dtype) -> Precision:
    """For a dot of `factors`, accumulated in `acc`: 16-bit tensor cores where both factors are the same 16-bit type,
    else fp32 at full precision through three tf32 products (plain tf32 would lose 13 bits), else fp64."""
    if acc == torch.float64:
        return Precision(tl.float64, tl.float64, "ieee")
    if len(set(factors)) == 1 and factors[0] in (torch.float16, torch.bfloat16):
        return Precision(tl.float32, TRITON_DTYPES[factors[0]], "ieee")
    return Precision(tl.float32, tl.float32, "tf32x3")


def acc_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp64 where an input is fp64, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def signed32(salt: int) -> int:
    """The salt's low 32 bits as a signed number, so that every salt has one Triton type and one compiled kernel."""
    return (salt & 0xFFFFFFFF) - ((salt & 0x80000000) << 1)


def rank_block(rank: int, itemsize: int = 4) -> int:
    """R is walked in blocks of this size: at least 16, which a dot needs; padded lanes are masked, not read."""
    return 32 if 16 < rank <= 32 and itemsize < 8 else 16


ALL_REGISTERS = {"maxnreg": 255}
"""Launch option where the grid, not registers, limits how many programs share a multiprocessor: else the compiler may
spill to fit more."""


def interpreted() -> bool:
    """Whether these kernels run under Triton's interpreter (TRITON_INTERPRET=1 when they were decorated)."""
    return not isinstance(rounding.round_to, triton.runtime.JITFunction)
