"""How many programs share the tokens of a block of features, each a chunk: their sums are added afterwards."""

from ..gpus import Gpu

MIN_TOKENS = 128  # of a chunk: with fewer, a program would be all launch overhead
MOST_WAVES = 8
FULL = 0.9  # of the places of all waves


def token_chunks(tokens: int, blocks: int, resident: int, gpu: Gpu) -> int:
    """For a grid of `blocks` × chunks on a GPU whose multiprocessors hold `resident` programs at once: as many as fill
    one wave, or, where blocks divide it badly, the fewest whole waves. A few programs beyond a wave would run when all
    others are done.

    By shape and architecture alone, so that the order of summation never depends on load.
    """
    places, fill, chunks = resident * gpu.multiprocessors, 0.0, 1
    for waves in range(1, MOST_WAVES + 1):
        fitting = waves * places // blocks
        filled = fitting * blocks / (waves * places)
        if fill < FULL and filled > fill:
            fill, chunks = filled, fitting
    return max(1, min(chunks, tokens // MIN_TOKENS))
