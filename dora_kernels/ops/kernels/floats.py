"""Floats of 8 and 4 bits as fp32, exactly: their bits are moved to where fp32 has them, subnormal numbers included.

GPUs before 8.9 have no such types.
"""

import triton
import triton.language as tl


@triton.jit
def from_e4m3(codes):
    """Of the low byte of int32: sign, four bits of exponent and three of mantissa; no infinity, and NaN in all ones."""
    # The shift to the right leaves the sign where it is, and copies of it that are masked.
    bits = (codes << 24 >> 4) & -0x78000001
    values = bits.to(tl.float32, bitcast=True) * 2.0**120  # the difference of the exponents' biases
    return tl.where(tl.abs(values) > 448.0, float("nan"), values)  # all ones would be 480


@triton.jit
def from_e2m1(codes):
    """Of the low four bits of int32: sign, two bits of exponent and one of mantissa; neither infinity nor NaN."""
    bits = (codes << 28 >> 6) & -0x7E000001
    return bits.to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def from_e8m0(codes):
    """2^(code − 127), subnormal for 0 and infinite for 255."""
    bits = codes.to(tl.int32)
    return tl.where(bits == 0, 0x00400000, bits << 23).to(tl.float32, bitcast=True)
