"""The order of rows, and the label of tokens that are not trained."""

import random

IGNORED = -100  # the label that cross entropy ignores


def steps_per_epoch(rows: int, batch: int) -> int:
    """Optimizer steps in one pass over the data; the last may have fewer than `batch` rows."""
    return -(-rows // batch)


def rows_of_step(rows: int, batch: int, seed: int, step: int) -> list[int]:
    """The rows of optimizer step `step`, from 0: a pure function of its arguments.

    So a resumed run needs no data-loader state.
    """
    epoch, position = divmod(step, steps_per_epoch(rows, batch))
    return order_of_epoch(rows, seed, epoch)[position * batch : (position + 1) * batch]


def order_of_epoch(rows: int, seed: int, epoch: int) -> list[int]:
    """The order in which epoch `epoch` (from 0) visits `rows` rows."""
    order = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
