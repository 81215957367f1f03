"""Tokens sorted by expert, dealt out in tiles of which none holds tokens of two experts.

The tiles of expert 0 come first, then those of expert 1. How many there are is known on the GPU alone: a launch has
`most_tiles` programs, and those without a tile have no rows.
"""

import triton
import triton.language as tl


def most_tiles(tokens: int, experts: int, tile: int) -> int:
    """The number of tiles of `tile` tokens where as many experts as possible have one token more than fills theirs."""
    first = min(experts, tokens)
    return first + (tokens - first) // tile


@triton.jit
def _tiles(ends_ptr, E, TILE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Of each expert the first row, the end of its rows, and the number of tiles up to its last."""
    offs_e = tl.arange(0, BLOCK_E)
    ends = tl.load(ends_ptr + offs_e, mask=offs_e < E, other=0)
    starts = tl.load(ends_ptr + offs_e - 1, mask=(offs_e > 0) & (offs_e < E), other=0)
    return starts, ends, tl.cumsum((ends - starts + TILE - 1) // TILE, axis=0)


@triton.jit
def _of_expert(values, expert, BLOCK_E: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK_E) == expert, values, 0), axis=0)


@triton.jit
def rows_of_tile(ends_ptr, tile, E, TILE: tl.constexpr, BLOCK_E: tl.constexpr):
    """The tile's expert, its expert's first row, and the rows where the tile starts and ends: none behind the last."""
    starts, ends, tiles = _tiles(ends_ptr, E, TILE, BLOCK_E)
    before = tiles <= tile
    expert = tl.sum(before.to(tl.int32), axis=0)
    start = _of_expert(starts, expert, BLOCK_E)
    first = start + (tile - tl.max(tl.where(before, tiles, 0), axis=0)) * TILE
    end = tl.minimum(first + TILE, _of_expert(ends, expert, BLOCK_E))
    return tl.minimum(expert, E - 1), start, first, tl.where(expert < E, end, first)


@triton.jit
def tiles_of_expert(ends_ptr, expert, E, TILE: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert's first tile, and the one behind its last."""
    tiles = _tiles(ends_ptr, E, TILE, BLOCK_E)[2]
    return _of_expert(tiles, expert - 1, BLOCK_E), _of_expert(tiles, expert, BLOCK_E)
