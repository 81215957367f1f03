"""Rounding an fp32 tensor to bf16 or fp16: to nearest, or dithered.

Dithered rounding adds a hash of the element's index to the bits that the cast drops, and truncates: unbiased over
elements like stochastic rounding, so that updates below half an ulp survive in the mean, yet a pure function of
(row, column, salt), so that forward, recompute and backward see the same value.
"""

import torch

from ..types import Rounding

_LOW32 = 0xFFFFFFFF


def _fmix32(h: torch.Tensor) -> torch.Tensor:
    """murmur3's 32-bit finaliser (Appleby, public domain) on int64 tensors that hold unsigned 32-bit values."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _LOW32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _LOW32
    return h ^ (h >> 16)


def dither_hash(rows: torch.Tensor, columns: torch.Tensor, salt: int) -> torch.Tensor:
    """a(row) · k(column) + b(row) modulo 2³²: [rows], [columns] int64 -> [rows, columns] int32.

    a and b are hashes of the row and the salt, a is odd, and k is a hash of the column. The upper 16 bits pass for
    independent noise, the lower ones do not.
    """
    row_hash = _fmix32((rows & _LOW32) ^ (salt * 0x9E3779B9 & _LOW32))
    column_hash = (columns * 0x9E3779B9) & _LOW32
    column_hash = (column_hash ^ (column_hash >> 15)).int()
    return (row_hash | 1).int()[:, None] * column_hash[None, :] + (row_hash * 0xC2B2AE35).int()[:, None]


def round_to(x: torch.Tensor, dtype: torch.dtype, rounding: Rounding, first_row: int = 0) -> torch.Tensor:
    """`x` [rows, columns] as `dtype`; `first_row` is the index of its first row in the whole tensor.

    Only fp32 to bf16 or fp16 can be dithered; any other cast is exact or to nearest. Representable values, zeros,
    infinities and NaN are never moved. In fp16 a value becomes infinity exactly where nearest makes it one.
    """
    if rounding.mode == "nearest" or x.dtype != torch.float32 or dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    rows = torch.arange(first_row, first_row + x.shape[0], device=x.device)
    noise = dither_hash(rows, torch.arange(x.shape[1], device=x.device), rounding.salt)
    if dtype == torch.bfloat16:
        bits = x.view(torch.int32) + ((noise >> 16) & 0xFFFF)
        dithered = (bits & ~0xFFFF).view(torch.float32)
        # The largest NaN pattern plus noise would wrap to zero. Infinity stays: its lower half is zero.
        moves = ~x.isnan()
    else:
        # fp16 has subnormals inside fp32's normal range: the step is its ulp, or 2⁻²⁴ where that is larger.
        binade = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
        step = (binade * 2.0**-10).clamp_min(2.0**-24)
        # 13 random bits, as many as an fp32 mantissa has beyond fp16's: the sum below is exact.
        steps = torch.floor(x.abs() / step + ((noise >> 19) & 0x1FFF).to(torch.float32) * 2.0**-13)
        dithered = torch.copysign((steps * step).clamp_max(65504.0), x)
        # From here on nearest gives infinity: a GradScaler must see the overflow. NaN compares false.
        moves = x.abs() < 65520.0
    return torch.where(moves, dithered, x).to(dtype)
