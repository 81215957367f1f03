"""Addresses of two dimensions, at sizes that no test allocates."""

import inspect
import pathlib
import re

import pytest
import torch
import triton
import triton.language as tl

from dora_kernels.ops import kernels
from dora_kernels.ops.kernels.blocks import offsets_2d


@triton.jit
def _offsets_kernel(out_ptr, row, column, stride_row, stride_column):
    offsets = offsets_2d(row + tl.arange(0, 16), column + tl.arange(0, 16), stride_row, stride_column)
    tl.store(out_ptr + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], offsets)


@pytest.mark.parametrize(
    ("row", "column", "strides"),
    [(300_000, 28_000, (28_672, 1)), (28_000, 300_000, (1, 28_672)), (2**30, 2**30, (3, 5))],
    ids=["rows", "columns", "both"],
)
def test_offsets_past_two_to_the_31(row, column, strides, device):
    """The arithmetic every kernel uses for its addresses, where M·N and N·K pass 2³¹."""
    out = torch.empty(16, 16, dtype=torch.int64, device=device)
    _offsets_kernel[(1,)](out, row, column, *strides)
    rows, columns = row + torch.arange(16), column + torch.arange(16)
    expected = rows[:, None] * strides[0] + columns[None, :] * strides[1]
    assert expected.max() > 2**31
    assert torch.equal(out.cpu(), expected)


def test_every_two_dimensional_address_is_that_arithmetic():
    """A row times a stride anywhere else in the kernels would be int32, and wrap only at sizes no test allocates."""
    product = r"\[(?::, None|None, :)\]\s*\*\s*(?:stride|[A-Z]\b)"
    files = pathlib.Path(inspect.getfile(kernels)).parent.glob("*.py")
    found = {path.name: re.findall(product, path.read_text()) for path in files}
    assert {name: len(places) for name, places in found.items() if places} == {"blocks.py": 2}
