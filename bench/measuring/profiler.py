"""The time of each kernel that a call launches, from the GPU's own profile: without gaps, events or the CPU."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from . import timing
from .timing import attempt

REPETITIONS = 5


class Kernel(NamedTuple):
    """One launch, as a profiler names it; the median over repetitions."""

    name: str
    seconds: float


def profile(call: Callable[[], object], device: torch.device) -> dict | None:
    """For a result: each kernel's name and seconds, and Triton's figure if it has one, or why not; None on a CPU."""
    if device.type != "cuda":
        return None
    kernels, failure = attempt(lambda: kernels_of(call, device), who="the profiler")
    proton, no_proton = attempt(lambda: proton_seconds(call), who="Triton's profiler")
    found = {"failed": failure} if failure else {"kernels": [list(kernel) for kernel in kernels]}
    return found | {"proton_seconds": proton, "proton_failed": no_proton}


def profiled_seconds(row: dict) -> float | None:
    """The sum of a result's kernels."""
    kernels = (row.get("profile") or {}).get("kernels")
    return sum(time for _, time in kernels) if kernels else None


def kernels_of(call: Callable[[], object], device: torch.device) -> list[Kernel]:
    """In the order of their start. Before each repetition the L2 cache is filled with other data.

    Raises:
        RuntimeError: repetitions launched different kernels, or the profiler saw none.
    """
    flush = torch.empty(timing.FLUSH_BYTES, dtype=torch.uint8, device=device)
    call()
    torch.cuda.synchronize(device)
    # By its module, so that a stand-in is found.
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
        for _ in range(REPETITIONS):
            flush.zero_()
            call()
        torch.cuda.synchronize(device)
    events = sorted(
        (event for event in profile.events() if event.device_type == DeviceType.CUDA),
        key=lambda event: event.time_range.start,
    )
    launches, rest = divmod(len(events), REPETITIONS)
    repetitions = [events[i * launches : (i + 1) * launches] for i in range(REPETITIONS)]
    names = [[event.name for event in repetition] for repetition in repetitions]
    if rest or launches < 2 or names != [names[0]] * REPETITIONS:
        raise RuntimeError(f"the profiler saw {len(events)} kernels in {REPETITIONS} repetitions that should be alike")
    # The first of each repetition is the flush.
    return [
        Kernel(name, statistics.median(repetition[i].time_range.elapsed_us() for repetition in repetitions) / 1e6)
        for i, name in list(enumerate(names[0]))[1:]
    ]


def proton_seconds(call: Callable[[], object]) -> float | None:
    """The same in one number from Triton's profiler, where the installed Triton has a benchmark of it; else None."""
    from triton import testing

    bench = getattr(testing, "do_bench_proton", None)
    return None if bench is None else bench(call) / 1e3
