"""Bytes that kernels load and store under Triton's interpreter, masked lanes left out, launch by launch."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest.mock import patch

from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder


class Counted(NamedTuple):
    """One launch and what it moved."""

    kernel: object
    grid: tuple[int, ...]
    args: tuple
    loaded: int
    stored: int


@contextmanager
def count_bytes() -> Iterator[list[Counted]]:
    """Yields the list that each launch inside is added to when it is over."""
    launches: list[Counted] = []
    moved = {"loaded": 0, "stored": 0}
    load, store, run = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        InterpretedFunction.run,
    )

    # Every load and store passes here; unmasked ones with a mask that is all ones.
    def counted_load(self, ptrs, mask, *rest):
        moved["loaded"] += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        moved["stored"] += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return store(self, ptrs, value, mask, *rest)

    def counted_run(self, *args, grid, **options):
        moved.update(loaded=0, stored=0)
        result = run(self, *args, grid=grid, **options)
        launches.append(Counted(self, grid, args, **moved))
        return result

    with ExitStack() as stack:
        stack.enter_context(patch.object(InterpreterBuilder, "create_masked_load", counted_load))
        stack.enter_context(patch.object(InterpreterBuilder, "create_masked_store", counted_store))
        stack.enter_context(patch.object(InterpretedFunction, "run", counted_run))
        yield launches
