"""How many tokens each expert has where tensors hold no numbers: all equally many."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from dora_kernels.ops import dora_experts, grouped, stacks


@contextmanager
def spread_evenly(rows: int) -> Iterator[None]:
    """Inside, loops over experts see so many rows, those of all experts of a layer, spread evenly."""

    def evenly(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
        share = rows // len(ends)
        yield from (
            (expert, slice(expert * share, (expert + 1) * share)) for expert in range(len(ends) if share else 0)
        )

    with ExitStack() as stack:
        for module in (dora_experts, grouped, stacks):
            stack.enter_context(mock.patch.object(module, "expert_rows", evenly))
        yield
