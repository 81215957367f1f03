"""Floats of 8 and 4 bits as fp32, exactly: their bits are moved to where fp32 has them, subnormal numbers included.

GPUs before 8.9 have no such types.
"""

import triton
import triton.language as tl


@triton.jit
def from_e4m3(codes):
    """Of int32: sign, four bits of exponent and three of mantissa; no infinity, and NaN in all ones."""
    bits = ((codes & 0x80) << 24) | ((codes & 0x7F) << 20)
    values = bits.to(tl.float32, bitcast=True) * 2.0**120  # the difference of the exponents' biases
    return tl.where((codes & 0x7F) == 0x7F, float("nan"), values)


@triton.jit
def from_e2m1(codes):
    """Of int32: sign, two bits of exponent and one of mantissa; neither infinity nor NaN."""
    bits = ((codes & 0x8) << 28) | ((codes & 0x7) << 22)
    return bits.to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def from_e8m0(codes):
    """2^(code − 127), subnormal for 0 and infinite for 255."""
    bits = codes.to(tl.int32)
    return tl.where(bits == 0, 0x00400000, bits << 23).to(tl.float32, bitcast=True)
