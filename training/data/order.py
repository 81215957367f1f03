"""The order of rows, and the label of tokens that are not trained: the same in every loop."""

import random

IGNORED = -100  # the label that cross entropy leaves out


def steps_per_epoch(rows: int, batch: int) -> int:
    """Optimizer steps in one pass over the data; the last may have fewer than `batch` rows."""
    return -(-rows // batch)


def rows_of_step(rows: int, batch: int, seed: int, step: int) -> list[int]:
    """Which rows optimizer step `step` (from 0) trains on: a pure function of its arguments.

    So a resumed run needs no data-loader state: it asks for the step it is at.
    """
    epoch, position = divmod(step, steps_per_epoch(rows, batch))
    return order_of_epoch(rows, seed, epoch)[position * batch : (position + 1) * batch]


def order_of_epoch(rows: int, seed: int, epoch: int) -> list[int]:
    """The order in which epoch `epoch` (from 0) visits `rows` rows."""
    order = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
