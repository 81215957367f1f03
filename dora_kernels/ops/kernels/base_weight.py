"""Reading a block of the frozen weight, whether it is a matrix or packed in NF4 (`quantized.Nf4Weight`)."""

import torch
import triton
import triton.language as tl

from ..base_weights import Nf4Weight
from .blocks import lora_dot, offsets_2d
from .launch import TRITON_DTYPES


@triton.jit
def absmax_of(blocks, mask, w, NESTED_BLOCK: tl.constexpr):
    """The largest magnitude of each NF4 block, fp32, 0 where masked."""
    if NESTED_BLOCK == 0:
        absmax = tl.load(w[1] + blocks, mask=mask, other=0.0)
    else:
        code = tl.load(w[1] + blocks, mask=mask, other=0).to(tl.int32)
        scale = tl.load(w[3] + blocks // NESTED_BLOCK, mask=mask, other=0.0)
        absmax = tl.where(mask, tl.load(w[4] + code) * scale + tl.load(w[5]), 0.0)
    return absmax


@triton.jit
def decoded(nibbles, w, SIZE: tl.constexpr):
    """The code's value for each of SIZE nibbles, in their shape."""
    code = tl.load(w[2] + tl.arange(0, 16))
    return tl.reshape(tl.gather(code, tl.reshape(nibbles.to(tl.int32), [SIZE]), 0), nibbles.shape)


@triton.jit
def nf4_block(
    w, offs_n, start_k, N, K, row_bytes,
    NF4_BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, WHOLE_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W [BLOCK_N, BLOCK_K] in fp32 from column `start_k` on, zero outside [N, K]."""
    mask_n = offs_n < N
    if WHOLE_BLOCKS:
        # Rows of whole bytes and whole blocks: each byte is read once, each block's scale once.
        GROUP: tl.constexpr = NF4_BLOCK if NF4_BLOCK < BLOCK_K else BLOCK_K
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        # Written so that the compiler sees what divides these offsets, and reads 16 bytes at a time.
        offs_byte = start_k // BLOCK_K * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        pairs = tl.load(  # [BLOCK_N, BLOCK_K / 2]
            w[0] + offsets_2d(offs_n, offs_byte, row_bytes, 1),
            mask=mask_n[:, None] & (offs_byte < row_bytes)[None, :],
            other=0,
        )
        first = start_k + GROUP * tl.arange(0, GROUPS)
        absmax = absmax_of(
            offsets_2d(offs_n, first // NF4_BLOCK, K // NF4_BLOCK, 1),
            mask_n[:, None] & (first < K)[None, :],
            w,
            NESTED_BLOCK,
        )
        absmax = tl.broadcast_to(absmax[:, :, None], [BLOCK_N, GROUPS, GROUP // 2])
        absmax = tl.reshape(absmax, [BLOCK_N, BLOCK_K // 2])
        high = decoded(pairs >> 4, w, BLOCK_N * BLOCK_K // 2) * absmax
        low = decoded(pairs & 15, w, BLOCK_N * BLOCK_K // 2) * absmax
        block = tl.interleave(high, low)
    else:
        # Blocks, and bytes where K is odd, straddle output features.
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask = mask_n[:, None] & (offs_k < K)[None, :]
        flat = offsets_2d(offs_n, offs_k, K, 1)
        pairs = tl.load(w[0] + flat // 2, mask=mask, other=0)
        nibbles = tl.where(flat % 2 == 0, pairs >> 4, pairs & 15)
        block = decoded(nibbles, w, BLOCK_N * BLOCK_K) * absmax_of(flat // NF4_BLOCK, mask, w, NESTED_BLOCK)
    return block


@triton.jit
def weight_block(
    w, offs_n, start_k, N, K, stride_wn, stride_wk,
    NF4_BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, WEIGHT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W [BLOCK_N, BLOCK_K] from column `start_k` on, zero outside [N, K]. `w` holds the pointers of `weight_arguments`,
    and NF4_BLOCK is 0 for a matrix."""
    if NF4_BLOCK == 0:
        offs_k = start_k + tl.arange(0, BLOCK_K)
        block = tl.load(
            w[0] + offsets_2d(offs_n, offs_k, stride_wn, stride_wk),
            mask=(offs_n < N)[:, None] & (offs_k < K)[None, :],
            other=0.0,
        )
    else:
        block = nf4_block(w, offs_n, start_k, N, K, stride_wn, NF4_BLOCK, NESTED_BLOCK, WHOLE_BLOCKS, BLOCK_N, BLOCK_K)
        block = block.to(WEIGHT_DTYPE)
    return block


@triton.jit
def _nf4_decode_kernel(
    # pointers
    w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, decoded_ptr,
    # sizes
    N, K,
    # strides
    row_bytes,
    # constexpr
    NF4_BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, WEIGHT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    w = (w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start_k = tl.program_id(1) * BLOCK_K
    offs_k = start_k + tl.arange(0, BLOCK_K)
    block = nf4_block(w, offs_n, start_k, N, K, row_bytes, NF4_BLOCK, NESTED_BLOCK, WHOLE_BLOCKS, BLOCK_N, BLOCK_K)
    tl.store(
        decoded_ptr + offsets_2d(offs_n, offs_k, K, 1),
        block.to(WEIGHT_DTYPE).to(decoded_ptr.dtype.element_ty),
        mask=(offs_n < N)[:, None] & (offs_k < K)[None, :],
    )


def decode(weight: Nf4Weight, dtype: torch.dtype) -> torch.Tensor:
    """W [N, K] in `dtype`, rounded once, to nearest (with `parity` to the dtype it was quantised from, first)."""
    N, K = weight.shape
    pointers, (row_bytes, _), formats = weight_arguments(weight)
    decoded = torch.empty(N, K, dtype=dtype, device=weight.device)
    block_n, block_k = 32, 128
    _nf4_decode_kernel[(triton.cdiv(N, block_n), triton.cdiv(K, block_k))](
        *pointers, decoded, N, K, row_bytes, *formats, block_n, block_k, num_warps=4
    )
    return decoded


def straddles_of(weight: torch.Tensor | Nf4Weight) -> bool:
    """Whether it is NF4 whose blocks hold elements of two output features."""
    return isinstance(weight, Nf4Weight) and weight.straddles


def weight_arguments(weight: torch.Tensor | Nf4Weight) -> tuple[tuple, tuple, tuple]:
    """A kernel's arguments for the weight: six pointers (those that a format lacks are stand-ins), two strides (of
    packed rows in bytes), and the constants NF4_BLOCK, NESTED_BLOCK, WHOLE_BLOCKS, WEIGHT_DTYPE."""
    if isinstance(weight, torch.Tensor):
        return (weight,) * 6, weight.stride(), (0, 0, False, tl.float32)
    w = weight
    nested = (w.nested_absmax, w.nested_code, w.offset) if w.nested_blocksize else (w.absmax,) * 3
    dtype = TRITON_DTYPES[w.dtype] if w.parity else tl.float32
    return (
        (w.packed, w.absmax, w.code, *nested),
        (w.shape[1] // 2, 1),
        (w.blocksize, w.nested_blocksize, not w.straddles, dtype),
    )


@triton.jit
def adapted_tile(
    w, a_ptr, b_ptr, first, scaling, offs_n, start_k, N, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    NF4_BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, WEIGHT_DTYPE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, INPUT_PRECISION: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """V [BLOCK_N, BLOCK_K] in ACC from column `start_k` on, zero outside [N, K]; `w` as in `weight_block`."""
    # Before the dot, whose own loads then share the wait.
    weight = weight_block(
        w, offs_n, start_k, N, K, stride_wn, stride_wk,
        NF4_BLOCK, NESTED_BLOCK, WHOLE_BLOCKS, WEIGHT_DTYPE, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    offs_k = start_k + tl.arange(0, BLOCK_K)
    product = lora_dot(
        b_ptr, a_ptr, first, offs_n, offs_k, offs_n < N, offs_k < K, R,
        stride_bn, stride_br, stride_ar, stride_ak,
        ACC, DOT, INPUT_PRECISION, ONE_BLOCK, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    return weight.to(ACC) + scaling * product
