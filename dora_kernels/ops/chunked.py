"""fp32 work on 16-bit data without an fp32 copy of the whole: matrices walked in chunks of rows that stay in cache."""

from collections.abc import Iterator

import torch

CHUNK_ELEMENTS = 1 << 19  # 2 MiB of fp32: the L2 caches of two cores, and few enough chunks that Python costs little


GPU_CHUNK_ELEMENTS = 1 << 25  # 128 MiB of fp32, of which a pass takes longer than its launch


def row_chunks(rows: int, columns: int, elements: int | None = None) -> Iterator[slice]:
    """Slices that cover `rows` rows, each of about `elements` elements (`CHUNK_ELEMENTS`) and at least one row.

    One slice of all in compiled code, which would hold a copy of the loop's body for each chunk, and for each number of
    tokens a graph of its own.
    """
    if torch.compiler.is_compiling():
        yield slice(0, rows)
        return
    step = _rows_per_chunk(columns, elements or CHUNK_ELEMENTS)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def chunk_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for the largest of `row_chunks(rows, columns)`, to be written over in each turn: it stays in cache."""
    if not torch.compiler.is_compiling():
        rows = min(rows, _rows_per_chunk(columns, CHUNK_ELEMENTS))
    return torch.empty(rows, columns, dtype=dtype, device=device)


def _rows_per_chunk(columns: int, elements: int) -> int:
    return max(1, elements // max(1, columns))


def mm_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [P, M] @ b [M, Q] -> [P, Q] in fp32 (fp64 for fp64): the gradients of fp32 adapters over a bf16 base."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    # torch's CPU GEMM has no fp32 output for 16-bit inputs, and an fp32 copy of the activations would be large.
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    for rows in row_chunks(b.shape[0], max(a.shape[0], b.shape[1])):
        out.addmm_(a[:, rows].float(), b[rows].float())
    return out
