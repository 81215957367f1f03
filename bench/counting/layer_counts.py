"""A call of a layer or a block, forward and backward, counted on fake tensors: its launches and its memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..contestants import block, layer
from ..contestants.block import BlockProblem
from ..contestants.layer import Contestant, Entry, Problem
from ..measuring.memory import saved_bytes
from ..measuring.shapes import BlockShape, Shape
from .traffic import Counter, Operation, counting, fake_module


def count(
    contestant: Contestant,
    shape: Shape | BlockShape,
    tokens: int,
    rank: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> tuple[dict[str, list[Operation]], int]:
    """The launches of each part, and the peak memory beyond parameters and inputs."""
    with _built(contestant, shape, tokens, rank, dtype, capability) as (counter, entry, problem):
        counter.take()
        before = counter.restart()
        parts = {}
        for part in entry.phases(problem)():
            parts[part] = counter.take()
        return parts, counter.peak - before


def saved_by(
    contestant: Contestant,
    shape: Shape | BlockShape,
    tokens: int,
    rank: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> int:
    """Bytes that the forward leaves for the backward, beyond parameters and the input."""
    with _built(contestant, shape, tokens, rank, dtype, capability) as (_, entry, problem):
        return saved_bytes(lambda: entry.forward(problem.x), [problem.x, *entry.module.parameters()])


@contextmanager
def _built(
    contestant, shape, tokens, rank, dtype, capability
) -> Iterator[tuple[Counter, Entry, Problem | BlockProblem]]:
    """Inside, everything is counted."""
    empty_problem = (block if isinstance(shape, BlockShape) else layer).empty_problem
    # Built outside the counter, without data: some builders move parameters, which fake ones refuse.
    entry = contestant.build(empty_problem(shape, tokens, rank, dtype, "meta"))
    with counting(capability) as counter:
        fake = fake_module(entry.module)
        entry = entry._replace(trained={name: fake[id(p)] for name, p in entry.trained.items()})
        yield counter, entry, empty_problem(shape, tokens, rank, dtype, "cpu")
