"""Walking a matrix in blocks of rows that stay in cache, so that no fp32 copy of the whole is ever made."""

from collections.abc import Iterator

import torch

CHUNK_ELEMENTS = 1 << 19  # 2 MiB of fp32: the L2 caches of two cores, and few enough chunks that Python costs little


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover `rows` rows, each of about `CHUNK_ELEMENTS` elements and at least one row."""
    step = _rows_per_chunk(columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def chunk_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for the largest of `row_chunks(rows, columns)`, to be written over in each turn: it stays in cache."""
    return torch.empty(min(rows, _rows_per_chunk(columns)), columns, dtype=dtype, device=device)


def _rows_per_chunk(columns: int) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, columns))
