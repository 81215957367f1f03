"""Products of tokens sorted by expert with each expert's own matrix.

`ends` [E] int32 says where each expert's rows end: those of expert e are ends[e − 1] … ends[e].
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .gpus import MIN_CAPABILITY


def expert_rows(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have tokens, and their rows. Waits for the GPU, as the numbers must be here."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def grouped_mm(x: torch.Tensor, stack: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [S, K] @ stack [E, K, N] -> [S, N], each row with its expert's matrix, in x's dtype.

    PyTorch's grouped product where it takes these, else a loop over experts with the same results.
    """
    if _is_grouped(x, stack):
        return F.grouped_mm(x, stack, offs=ends)
    out = x.new_empty(x.shape[0], stack.shape[2])
    for expert, rows in expert_rows(ends):
        torch.mm(x[rows], stack[expert], out=out[rows])
    return out


def _is_grouped(x: torch.Tensor, stack: torch.Tensor) -> bool:
    """Whether PyTorch's product takes them: bf16, and rows or columns that start at multiples of 16 bytes."""
    if x.is_cuda:
        has_product = torch.cuda.get_device_capability(x.device) >= MIN_CAPABILITY
    else:
        has_product = x.device.type == "cpu"
    is_16_bit = x.dtype == stack.dtype == torch.bfloat16
    return has_product and is_16_bit and x.shape[0] > 0 and _is_aligned(x) and _is_aligned(stack)


def _is_aligned(matrices: torch.Tensor) -> bool:
    *others, row, column = matrices.stride()
    outer = row if column == 1 else column if row == 1 else 0
    return all(step > 0 and step % 8 == 0 for step in (*others, outer))
