"""Blocks of the frozen weight W [N, K], and of V = W + s B A: W is a matrix, or packed and decoded as it is read."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..base_weights import Fp4Weight, Fp8Weight, Int4Weight, Packed
from .blocks import Matrix, addresses, offsets_2d
from .fp4 import fp4_block
from .fp8 import fp8_block
from .int4 import int4_block
from .launch import TRITON_DTYPES, cdiv, dot_of
from .lora_dot import Dot, lora_dot


class Format(NamedTuple):
    """How W lies in memory, known when a kernel is compiled."""

    nf4_block: int = 0  # elements that share a scale; 0 for a matrix
    nested_block: int = 0  # scales that share a scale; 0 where they are fp32
    whole_blocks: bool = False  # no block, and no byte, holds elements of two output features
    dtype: tl.dtype = tl.float32  # to which decoded values are rounded
    fp8: bool = False
    scale_rows: int = 0  # output features that share an FP8 scale; 0 for all
    scale_columns: int = 0  # input features that do; 0 for all
    int4: bool = False
    group: int = 0  # input features that share an int4 or FP4 scale; 0 for all
    group_unit: int = 1  # divides the number of groups, which lets reads of scales be wide
    has_zeros: bool = False
    has_groups: bool = False  # each input feature says its group
    rows_are_outputs: bool = False  # and the rest of an `Int4Layout`
    words_along_outputs: bool = False
    interleaved: bool = False
    fp4: str = ""  # its scales: "e8m0", or "e4m3" alone, "e4m3 over" a global one, or "e4m3 times" it

    @property
    def straddles(self) -> bool:
        """Whether scales are read one by one: NF4 whose blocks hold elements of two output features, or int4 whose
        input features each say their group."""
        return (self.nf4_block > 0 and not self.whole_blocks) or self.has_groups


class WeightMemory(NamedTuple):
    """W as a kernel sees it; pointers that its format lacks are stand-ins."""

    data: Any
    absmax: Any  # of FP8, FP4 and int4 the scales
    code: Any  # of int4 the zeros, of FP4 the global scale
    nested_absmax: Any  # of int4 each input feature's group
    nested_code: Any
    offset: Any
    stride_n: Any  # of NF4 and FP4 in bytes, of int4 in words
    stride_k: Any


def weight_arguments(weight: torch.Tensor | Packed) -> tuple[WeightMemory, Format]:
    """A kernel's first eight arguments, and its FORMAT."""
    if isinstance(weight, torch.Tensor):
        return WeightMemory(*(weight,) * 6, *weight.stride()), Format()
    if isinstance(weight, Fp8Weight):
        codes, scales = weight.codes.view(torch.uint8), weight.scales.float().contiguous()
        rows, columns = (0 if part >= size else part for part, size in zip(weight.block, weight.shape, strict=True))
        memory = WeightMemory(codes, scales, *(scales,) * 4, *codes.stride())
        return memory, Format(fp8=True, scale_rows=rows, scale_columns=columns)
    if isinstance(weight, Int4Weight):
        return _int4_arguments(weight)
    if isinstance(weight, Fp4Weight):
        return _fp4_arguments(weight)
    w = weight
    nested = (w.nested_absmax, w.nested_code, w.offset) if w.nested_blocksize else (w.absmax,) * 3
    dtype = TRITON_DTYPES[w.dtype] if w.parity else tl.float32
    return (
        WeightMemory(w.packed, w.absmax, w.code, *nested, w.shape[1] // 2, 1),
        Format(w.blocksize, w.nested_blocksize, not w.straddles, dtype),
    )


def _int4_arguments(weight: Int4Weight) -> tuple[WeightMemory, Format]:
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
    zeros = codes if weight.zeros is None else weight.zeros.contiguous()
    groups = codes if weight.groups is None else weight.groups.contiguous()
    strides = codes.stride() if weight.layout.rows_are_outputs else codes.stride()[::-1]
    memory = WeightMemory(codes, scales, zeros, groups, codes, codes, *strides)
    return memory, Format(
        dtype=TRITON_DTYPES[weight.dtype],
        int4=True,
        group=0 if weight.group == weight.shape[1] else weight.group,
        group_unit=math.gcd(weight.shape[1] // weight.group, 8),
        has_zeros=weight.zeros is not None,
        has_groups=weight.groups is not None,
        **weight.layout._asdict(),
    )


def _fp4_arguments(weight: Fp4Weight) -> tuple[WeightMemory, Format]:
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous().view(torch.uint8)
    kind = "e8m0" if weight.scales.dtype == torch.uint8 else "e4m3"
    factor = scales
    if weight.global_scale is not None:
        factor, kind = weight.global_scale, f"{kind} {'times' if weight.is_factor else 'over'}"
    memory = WeightMemory(codes, scales, factor, *(scales,) * 3, *codes.stride())
    unit = math.gcd(weight.shape[1] // weight.group, 16)
    return memory, Format(dtype=TRITON_DTYPES[weight.dtype], group=weight.group, group_unit=unit, fp4=kind)


def adapted_dot(
    weight: torch.Tensor | Packed, lora_A: torch.Tensor, lora_B: torch.Tensor, acc: torch.dtype, **options
) -> Dot:
    """How B A is computed, to be added to W: a packed weight is coarser than one of 16 bits."""
    onto = weight.dtype if isinstance(weight, torch.Tensor) else torch.bfloat16
    return dot_of(lora_A.shape[0], lora_A.dtype, lora_B.dtype, acc=acc, onto=onto, **options)


@triton.jit
def absmax_of(w, blocks, mask, FORMAT: tl.constexpr):
    """The largest magnitude of each NF4 block, fp32, 0 where masked."""
    if FORMAT.nested_block == 0:
        absmax = tl.load(w.absmax + blocks, mask=mask, other=0.0)
    else:
        code = tl.load(w.absmax + blocks, mask=mask, other=0).to(tl.int32)
        scale = tl.load(w.nested_absmax + blocks // FORMAT.nested_block, mask=mask, other=0.0)
        absmax = tl.where(mask, tl.load(w.nested_code + code) * scale + tl.load(w.offset), 0.0)
    return absmax


@triton.jit
def decoded(w, nibbles):
    """The code's value for each nibble."""
    code = tl.load(w.code + tl.arange(0, 16))
    return tl.reshape(tl.gather(code, tl.reshape(nibbles.to(tl.int32), [nibbles.numel]), 0), nibbles.shape)


@triton.jit
def nf4_block(w, offs_n, start_k, N, K, FORMAT: tl.constexpr, BLOCK_K: tl.constexpr):
    """W [len(offs_n), BLOCK_K] from column `start_k` on, zero outside [N, K]."""
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    mask_n = offs_n < N
    if FORMAT.whole_blocks:
        # Rows of whole bytes and whole blocks: each byte is read once, each block's scale once.
        GROUP: tl.constexpr = FORMAT.nf4_block if FORMAT.nf4_block < BLOCK_K else BLOCK_K
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        # Written so that the compiler sees what divides these offsets, and reads 16 bytes at a time.
        offs_byte = start_k // BLOCK_K * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        mask = mask_n[:, None] & (offs_byte < w.stride_n)[None, :]
        pairs = tl.load(w.data + offsets_2d(offs_n, offs_byte, w.stride_n, 1), mask=mask, other=0)
        offs_group = start_k + GROUP * tl.arange(0, GROUPS)
        blocks = offsets_2d(offs_n, offs_group // FORMAT.nf4_block, K // FORMAT.nf4_block, 1)
        absmax = absmax_of(w, blocks, mask_n[:, None] & (offs_group < K)[None, :], FORMAT)
        absmax = tl.broadcast_to(absmax[:, :, None], [BLOCK_N, GROUPS, GROUP // 2])
        absmax = tl.reshape(absmax, [BLOCK_N, BLOCK_K // 2])
        high = decoded(w, pairs >> 4) * absmax
        low = decoded(w, pairs & 15) * absmax
        block = tl.interleave(high, low)
    else:
        # Blocks, and bytes where K is odd, straddle output features.
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask = mask_n[:, None] & (offs_k < K)[None, :]
        flat = offsets_2d(offs_n, offs_k, K, 1)
        pairs = tl.load(w.data + flat // 2, mask=mask, other=0)
        nibbles = tl.where(flat % 2 == 0, pairs >> 4, pairs & 15)
        block = decoded(w, nibbles) * absmax_of(w, flat // FORMAT.nf4_block, mask, FORMAT)
    return block.to(FORMAT.dtype)


@triton.jit
def weight_block(w, offs_n, start_k, N, K, FORMAT: tl.constexpr, BLOCK_K: tl.constexpr):
    """W [len(offs_n), BLOCK_K] from column `start_k` on, zero outside [N, K]."""
    if FORMAT.fp8:
        block = fp8_block(w, offs_n, start_k, N, K, FORMAT, BLOCK_K)
    elif FORMAT.int4:
        block = int4_block(w, offs_n, start_k, N, K, FORMAT, BLOCK_K)
    elif FORMAT.fp4 != "":
        block = fp4_block(w, offs_n, start_k, N, K, FORMAT, BLOCK_K)
    elif FORMAT.nf4_block > 0:
        block = nf4_block(w, offs_n, start_k, N, K, FORMAT, BLOCK_K)
    else:
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
        block = tl.load(addresses(Matrix(w.data, w.stride_n, w.stride_k), offs_n, offs_k), mask=mask, other=0.0)
    return block


@triton.jit
def adapted_block(
    w, a, b, b_block, scaling, offs_n, start_k, N, K, R, FORMAT: tl.constexpr, DOT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """V [len(offs_n), BLOCK_K] in `DOT.acc` from column `start_k` on, zero outside [N, K].

    `b_block` is B's first block of the rank, as in `lora_dot`.
    """
    offs_k = start_k + tl.arange(0, BLOCK_K)
    if DOT.one_block:
        # Before the dot, whose own loads then share the wait.
        weight = weight_block(w, offs_n, start_k, N, K, FORMAT, BLOCK_K)
    product = lora_dot(b, a, b_block, offs_n, offs_k, offs_n < N, offs_k < K, R, DOT)
    if not DOT.one_block:
        # After a dot whose loop takes far longer than one wait, and all registers.
        weight = weight_block(w, offs_n, start_k, N, K, FORMAT, BLOCK_K)
    return weight.to(DOT.acc) + scaling * product


@triton.jit
def _decode_kernel(
    # pointers and strides
    w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, stride_wn, stride_wk, decoded_ptr,
    # sizes
    N, K,
    # constexpr
    FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    w = WeightMemory(w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, stride_wn, stride_wk)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start_k = tl.program_id(1) * BLOCK_K
    offs_k = start_k + tl.arange(0, BLOCK_K)
    block = weight_block(w, offs_n, start_k, N, K, FORMAT, BLOCK_K).to(decoded_ptr.dtype.element_ty)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    tl.store(addresses(Matrix(decoded_ptr, K, 1), offs_n, offs_k), block, mask=mask)


def decode(weight: Packed, dtype: torch.dtype) -> torch.Tensor:
    """Twin of `reference.decode`."""
    N, K = weight.shape
    w, weight_format = weight_arguments(weight)
    decoded = torch.empty(N, K, dtype=dtype, device=weight.device)
    block_n, block_k = 32, 128
    _decode_kernel[(cdiv(N, block_n), cdiv(K, block_k))](
        *w, decoded, N, K, weight_format, block_n, block_k, num_warps=4
    )
    return decoded
