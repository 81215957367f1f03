"""Products over the rank, h Bᵀ and B A, and how exact they are.

Tensor cores multiply 16-bit numbers. An fp32 factor is therefore cut into bf16 pieces, each 8 bits of its mantissa:
three pieces are the factor itself. `launch.dot_of` says where that is exact enough.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .blocks import addresses


class Dot(NamedTuple):
    """How a product over the rank is computed; `launch.dot_of` chooses."""

    acc: tl.dtype  # of the accumulator
    operand: tl.dtype  # of both factors inside the product
    input_precision: str  # of fp32 factors
    block_r: int  # the rank is walked in blocks of this size
    one_block: bool  # the first block holds the whole rank
    in_pieces: bool = False  # factors that are not bf16 become bf16 pieces

    @property
    def is_16_bit(self) -> bool:
        """Whether what the tensor cores multiply has 16 bits: twice the rate of tf32, and half the registers."""
        return self.operand.primitive_bitwidth == 16


@triton.jit
def rank_block(left, offs_i, mask_i, start, R, DOT: tl.constexpr):
    """Columns start … start + block_r of a factor [I, R]: [len(offs_i), block_r]."""
    offs_r = start + tl.arange(0, DOT.block_r)
    mask = mask_i[:, None] & (offs_r < R)[None, :]
    return tl.load(addresses(left, offs_i, offs_r), mask=mask, other=0.0)


@triton.jit
def right_rank_block(right, offs_j, mask_j, start, R, DOT: tl.constexpr):
    """Rows start … start + block_r of a factor [R, J]: [block_r, len(offs_j)]."""
    offs_r = start + tl.arange(0, DOT.block_r)
    mask = (offs_r < R)[:, None] & mask_j[None, :]
    return tl.load(addresses(right, offs_r, offs_j), mask=mask, other=0.0)


@triton.jit
def first_piece(x):
    """The bf16 number nearest to `x`, and the rest of `x`, exactly; NaN where `x` is infinite.

    To nearest: pieces cut toward zero have rests of one sign, and the products that are left out would add up.
    """
    x = x.to(tl.float32)
    piece = x.to(tl.bfloat16)
    return piece, x - piece.to(tl.float32)


@triton.jit
def dot_in_pieces(left, right, product):
    """`product` + left · right: exact products beside a bf16 factor, else without those of two lower pieces."""
    if left.dtype == tl.bfloat16:
        high, rest = first_piece(right)
        middle, low = first_piece(rest)
        if right.dtype == tl.float32:  # an fp16 number is two pieces
            product = tl.dot(left, low.to(tl.bfloat16), product, input_precision="ieee")
        product = tl.dot(left, middle, product, input_precision="ieee")
        product = tl.dot(left, high, product, input_precision="ieee")
    elif right.dtype == tl.bfloat16:
        high, rest = first_piece(left)
        middle, low = first_piece(rest)
        if left.dtype == tl.float32:
            product = tl.dot(low.to(tl.bfloat16), right, product, input_precision="ieee")
        product = tl.dot(middle, right, product, input_precision="ieee")
        product = tl.dot(high, right, product, input_precision="ieee")
    else:
        left_high, left_low = first_piece(left)
        right_high, right_low = first_piece(right)
        product = tl.dot(left_low.to(tl.bfloat16), right_high, product, input_precision="ieee")
        product = tl.dot(left_high, right_low.to(tl.bfloat16), product, input_precision="ieee")
        product = tl.dot(left_high, right_high, product, input_precision="ieee")
    return product


@triton.jit
def dot_onto(left, right, product, DOT: tl.constexpr):
    """`product` + left · right, of blocks."""
    ACC: tl.constexpr = DOT.acc
    OPERAND: tl.constexpr = DOT.operand
    PRECISION: tl.constexpr = DOT.input_precision
    if DOT.in_pieces:
        product = dot_in_pieces(left, right, product)
    else:
        product = tl.dot(left.to(OPERAND), right.to(OPERAND), product, input_precision=PRECISION, out_dtype=ACC)
    return product


@triton.jit
def lora_dot(left, right, left_block, offs_i, offs_j, mask_i, mask_j, R, DOT: tl.constexpr, right_block=None):
    """left [I, R] · right [R, J] -> [len(offs_i), len(offs_j)] in `DOT.acc`.

    `left_block` is left's first block of the rank, `right_block` right's where the caller has it. Where they hold the
    whole rank nothing loops in here, and the compiler pipelines the caller's loop, the innermost one.
    """
    BLOCK_I: tl.constexpr = offs_i.shape[0]
    BLOCK_J: tl.constexpr = offs_j.shape[0]
    product = tl.zeros([BLOCK_I, BLOCK_J], dtype=DOT.acc)
    if DOT.one_block:
        if right_block is None:
            right_part = right_rank_block(right, offs_j, mask_j, 0, R, DOT)
        else:
            right_part = right_block
        product = dot_onto(left_block, right_part, product, DOT)
    else:
        for start in range(0, R, DOT.block_r):
            left_part = rank_block(left, offs_i, mask_i, start, R, DOT)
            right_part = right_rank_block(right, offs_j, mask_j, start, R, DOT)
            product = dot_onto(left_part, right_part, product, DOT)
    return product
