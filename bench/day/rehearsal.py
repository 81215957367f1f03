"""A day on a CPU that stands in for a GPU: sizes shrunk, and the faults that a GPU may have planned ahead."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from .. import kernels, roofs
from ..measuring import timing
from . import self_test
from .stand_in_gpu import LOST, StandInGpu, stand_in_gpu

FAULTS = {
    ("layer", 1): ("Event", 5, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")),
    ("questions", 3): ("Event.record", 9, RuntimeError(LOST)),
}
"""By step and case, counted from 1: the call of CUDA's interface, which one of them, and the error that it raises."""
_HERE: list[StandInGpu] = []


@contextmanager
def rehearsed() -> Iterator[StandInGpu]:
    """Inside, there is a GPU, and what would take a CPU long is small."""
    # Before CUDA answers: what they do when imported, they do as on a CPU.
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from tests.support import interpreter

    # Triton's own computes other numbers than a GPU in bf16.
    interpreter.install()
    # numpy's, from within it: a GPU says nothing.
    warnings.filterwarnings("ignore", "(invalid value|divide by zero|overflow) encountered", RuntimeWarning)
    with ExitStack() as stack:
        for module, name, small in (
            (timing, "FLUSH_BYTES", 1 << 10),
            (kernels, "COPY_ELEMENTS", {"cuda": 1 << 16}),
            (kernels, "GEMM_SIDE", {"cuda": 64}),
            (roofs, "GEMM_SIDE", {"cuda": 64}),
            (roofs, "L2_ELEMENTS", 1 << 8),
            (roofs, "IN_A_ROW", 4),
            (self_test, "TOKENS", 17),
        ):
            stack.enter_context(mock.patch.object(module, name, small))
        gpu = stack.enter_context(stand_in_gpu())
        _HERE.append(gpu)
        try:
            yield gpu
        finally:
            print(f"\nCUDA was asked: {', '.join(f'{name} {times}' for name, times in sorted(gpu.calls.items()))}")


def plan_faults(step: str, case: int) -> None:
    """Plans the faults of a case that is about to run."""
    if (step, case) in FAULTS:
        (gpu,) = _HERE
        name, number, error = FAULTS[step, case]
        gpu.faults[name, gpu.calls[name] + number] = error
