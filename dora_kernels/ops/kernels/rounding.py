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
    """fmix32(fmix32(row ^ salt) + column), uint32 [len(rows), len(columns)]."""
    row_hash = _fmix32(rows.to(tl.uint32) ^ tl.cast(salt, tl.uint32))
    return _fmix32(row_hash[:, None] + columns.to(tl.uint32)[None, :])


@triton.jit
def round_to(x, rows, columns, salt, DTYPE: tl.constexpr, DITHERED: tl.constexpr):
    """`x` [len(rows), len(columns)] as DTYPE; rows and columns are the indices in the whole tensor."""
    if DITHERED and x.dtype == tl.float32 and (DTYPE == tl.bfloat16 or DTYPE == tl.float16):
        noise = dither_hash(rows, columns, salt)
        bits = x.to(tl.uint32, bitcast=True)
        if DTYPE == tl.bfloat16:
            dithered = ((bits + (noise & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
            # Infinities and NaN as they are: a NaN's pattern plus a hash may wrap to zero.
            moves = (bits & 0x7F800000) != 0x7F800000
        else:
            # fp16's subnormals are normal fp32 numbers: the step is fp16's ulp, or 2⁻²⁴ where that is larger.
            step = (bits & 0x7F800000).to(tl.float32, bitcast=True) * 0.0009765625
            step = tl.maximum(step, 5.9604644775390625e-08)
            # Times the reciprocal of a power of two, which is exact: Triton's division is not, to the last bit.
            reciprocal = (0x7F000000 - step.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
            steps = tl.floor(tl.abs(x) * reciprocal + (noise & 0x1FFF).to(tl.float32) * 0.0001220703125)
            magnitude = tl.minimum(steps * step, 65504.0).to(tl.uint32, bitcast=True)
            dithered = (magnitude | (bits & 0x80000000)).to(tl.float32, bitcast=True)
            # What nearest rounds to infinity becomes it: a GradScaler must see the overflow. NaN compares false.
            moves = tl.abs(x) < 65520.0
        x = tl.where(moves, dithered, x)
    return x.to(DTYPE)
