"""Rounding an fp32 block to the type it is stored in: to nearest, or dithered (`reference.rounding` says why)."""

import triton
import triton.language as tl


@triton.jit
def _fmix32(h):
    """murmur3's 32-bit finaliser (Appleby, public domain) on uint32."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def dither_hash(rows, columns, salt):
    """uint32 [len(rows), len(columns)], of which the upper bits are the noise; `reference.rounding` has the formula."""
    row_hash = _fmix32(rows.to(tl.uint32) ^ tl.cast(salt, tl.uint32) * 0x9E3779B9)
    column_hash = columns.to(tl.uint32) * 0x9E3779B9
    column_hash = column_hash ^ (column_hash >> 15)
    return (row_hash | 1)[:, None] * column_hash[None, :] + (row_hash * 0xC2B2AE35)[:, None]


@triton.jit
def round_to(x, rows, columns, salt, DTYPE: tl.constexpr, DITHERED: tl.constexpr):
    """`x` [len(rows), len(columns)] as DTYPE; rows and columns are the indices in the whole tensor."""
    if DITHERED and x.dtype == tl.float32 and (DTYPE == tl.bfloat16 or DTYPE == tl.float16):
        noise = dither_hash(rows, columns, salt)
        bits = x.to(tl.uint32, bitcast=True)
        if DTYPE == tl.bfloat16:
            # Noise would carry a NaN's pattern past the last one. This NaN's lower half is zero, as infinity's is.
            bits = tl.where(x == x, bits, 0x7FC00000)
            # The upper half is the result: a cast from fp32 would round once more, an instruction for nothing.
            x = ((bits + (noise >> 16)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            # fp16's subnormals are normal fp32 numbers: the step is fp16's ulp, or 2⁻²⁴ where that is larger.
            step = (bits & 0x7F800000).to(tl.float32, bitcast=True) * 0.0009765625
            step = tl.maximum(step, 5.9604644775390625e-08)
            # Times the reciprocal of a power of two, which is exact: Triton's division is not, to the last bit.
            reciprocal = (0x7F000000 - step.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
            # 13 bits of noise, as many as an fp32 mantissa has beyond fp16's: the sum is exact.
            steps = tl.floor(tl.abs(x) * reciprocal + (noise >> 19).to(tl.float32) * 0.0001220703125)
            magnitude = tl.minimum(steps * step, 65504.0).to(tl.uint32, bitcast=True)
            dithered = (magnitude | (bits & 0x80000000)).to(tl.float32, bitcast=True)
            # What nearest rounds to infinity becomes it: a GradScaler must see the overflow. NaN compares false.
            x = tl.where(tl.abs(x) < 65520.0, dithered, x)
    return x.to(DTYPE)
