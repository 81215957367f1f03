"""What every launcher needs to know before it launches: types, precision of products, and whether kernels are
interpreted."""

import torch
import triton
import triton.language as tl

from ..gpus import Gpu
from . import rounding
from .lora_dot import Dot

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def dot_of(
    rank: int,
    *factors: torch.dtype,
    acc: torch.dtype,
    onto: torch.dtype = torch.float32,
    one_block_up_to: int = 32,
    walked_by: int = 16,
) -> Dot:
    """For a product of `factors` over the rank, accumulated in `acc` and added to values that were rounded to `onto`.

    Where the tensor cores multiply 16-bit numbers one block holds ranks up to `one_block_up_to`, and higher ranks are
    walked in blocks of `walked_by`.

    16-bit tensor cores where both factors are the same 16-bit type, and, in bf16 pieces, where `onto` has 16 bits: its
    own rounding is 2⁶ times the pieces' error or more. Elsewhere fp32 at full precision through three tf32 products
    (plain tf32 would lose 13 bits), or fp64.
    """
    same = len(set(factors)) == 1 and factors[0] in (torch.float16, torch.bfloat16)
    in_pieces = acc == torch.float32 and not same and onto.itemsize == 2
    if acc == torch.float64:
        precision = tl.float64, tl.float64, "ieee"
    elif same or in_pieces:
        precision = tl.float32, TRITON_DTYPES[factors[0] if same else torch.bfloat16], "ieee"
    else:
        precision = tl.float32, tl.float32, "tf32x3"
    sizes = (one_block_up_to, walked_by) if precision[1].primitive_bitwidth == 16 else ()
    block_r = rank_block_size(rank, acc.itemsize, *sizes)
    return Dot(*precision, block_r, rank <= block_r, in_pieces)


def rank_block_size(rank: int, itemsize: int, largest: int = 32, walked_by: int = 16) -> int:
    """The rank is walked in blocks of this size: at least 16, which a dot needs; padded lanes are masked, not read.
    A rank that no block holds is walked in blocks of `walked_by`."""
    size = max(16, next_power_of_2(rank))
    return 16 if itemsize == 8 else size if size <= largest else walked_by


def rank_blocks(gpu: Gpu, rank: int, has_room: bool, largest: int | None = None) -> dict[str, int]:
    """Options of `dot_of`. Each block of the rank takes the sums out of tensor memory and back, which takes longer than
    its products: there blocks are large, where registers have room for them. Ranks that 16 does not divide, and rows
    that start at odd addresses, take an address for each value and leave none."""
    are_large = gpu.has_tensor_memory and has_room and rank % 16 == 0
    largest = largest or (64 if are_large else 32)
    return {"one_block_up_to": largest, "walked_by": largest if are_large else 16}


def cdiv(numerator: int, denominator: int) -> int:
    """Rounded up. Triton's own takes microseconds outside a kernel, a fifth of what a launch takes of the host."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is `number` or more, for the same reason."""
    return 1 << (number - 1).bit_length()


def acc_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp64 where an input is fp64, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor itself where it is contiguous, or None."""
    return None if tensor is None else tensor.contiguous()


def contiguous_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself where the elements of a row lie side by side, as in a slice of columns."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def either(tensor: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """The tensor, or the stand-in for a pointer that a kernel does not read."""
    return unused if tensor is None else tensor


def signed32(salt: int) -> int:
    """The salt's low 32 bits as a signed number, so that every salt has one Triton type and one compiled kernel."""
    return (salt & 0xFFFFFFFF) - ((salt & 0x80000000) << 1)


ALL_REGISTERS = {"maxnreg": 255}
"""Launch option where the grid, not registers, limits how many programs share a multiprocessor: else the compiler may
spill to fit more."""


def interpreted() -> bool:
    """Whether these kernels run under Triton's interpreter (TRITON_INTERPRET=1 when they were decorated)."""
    return not isinstance(rounding.round_to, triton.runtime.JITFunction)
