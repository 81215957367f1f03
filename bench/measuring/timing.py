"""Time of competing calls, interleaved, and what happens to one that fails."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache
HEAD_START = 1_000_000  # cycles, half a millisecond: as long as a few launches take Python and Triton
Phases = Callable[[], Iterator[str]]
"""A call in parts: it yields the name of each part when that part is over, and may return what it computed."""
Inspect = Callable[[str, object], str | None]
"""Takes a contestant's name and what its call returned, between two repetitions; why it is wrong, or None."""


class Times(NamedTuple):
    """Seconds of one part: the median over repetitions, the quartiles around it, and the smallest; `orders` are the
    medians over the repetitions in drawn orders and over those in the reverse of each."""

    median: float
    low: float
    high: float
    minimum: float
    repetitions: int
    orders: tuple[float, float] | None = None


def interleaved(
    contestants: dict[str, Phases],
    device: torch.device,
    *,
    repetitions: int,
    warmup: int = 3,
    head_start: bool = False,
    inspect: Inspect = lambda name, returned: None,
) -> tuple[dict[str, dict[str, Times]], dict[str, str]]:
    """Times by contestant and part, and the reasons of those that raised, which are not timed.

    Each repetition runs every contestant once, in an order drawn anew, and the next in the reverse of that order: a
    machine that slows down or heats up does so for all, and each of two runs first as often as the other. Before each
    of them the GPU is idle and its L2 cache holds nothing of theirs. With `head_start` the GPU then waits until the
    call is in its queue: the time of the kernels alone, and not of the CPU behind them.
    What `inspect` finds wrong fails a contestant.
    """
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    failed: dict[str, str] = {}
    clock = _cuda_clock(device, head_start) if device.type == "cuda" else _cpu_clock
    shuffle = random.Random(0).shuffle
    order = list(contestants)
    gc.collect()
    gc.disable()  # its pauses would fall on whoever is running
    try:
        for repetition in range(-warmup, repetitions):
            if repetition % 2:
                order.reverse()
            else:
                shuffle(order)
            for name in order:
                if name in failed:
                    continue

                def run(name=name):
                    returned = []
                    return clock(_keeping(contestants[name], returned)), inspect(name, returned.pop())

                done, failure = attempt(run, who=name)
                passed, failure = done if done else (None, failure)
                if failure:
                    failed[name] = failure
                elif repetition >= 0:
                    seconds[name].append(passed)
    finally:
        gc.enable()
    return {name: summary(runs) for name, runs in seconds.items() if name not in failed}, failed


def _keeping(phases: Phases, returned: list) -> Phases:
    """The same call, which leaves in `returned` what it returned."""

    def run():
        returned.append((yield from phases()))

    return run


class ContextLost(RuntimeError):
    """An error after which this process can use the GPU no more, an access out of bounds for one."""


def attempt(call: Callable, who: str = ""):
    """What `call` returns and None, or None and why it failed: memory that ran out, or the error's first line.

    A benchmark outlives its contestants: one that cannot run is a row that says so.

    Raises:
        ContextLost: `who` broke the GPU's context; whatever came next would fail for it.
    """
    try:
        return call(), None
    except ContextLost:
        raise
    except Exception as error:
        failure = _reason(error)
    # Here the error is gone, and with it the frames that held its tensors.
    try:
        release()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception:
        raise ContextLost(f"{who or 'the case'}: {failure}") from None
    return None, failure


def _reason(error: Exception) -> str:
    text = str(error)
    # cuBLAS and cuDNN have words of their own for memory that they cannot get.
    ran_out = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in ran_out):
        return "out of memory"
    return f"{type(error).__name__}: {(text.strip().splitlines() or [''])[0][:150]}"


def release() -> None:
    """Hands back the memory of what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summary(runs: list[dict[str, float]]) -> dict[str, Times]:
    """By part, and their sum as "total"."""
    parts = {name: [run[name] for run in runs] for name in runs[0]}
    parts["total"] = [sum(run.values()) for run in runs]
    return {name: _times(values) for name, values in parts.items()}


def _times(values: list[float]) -> Times:
    median = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (median,) * 3
    orders = (statistics.median(values[::2]), statistics.median(values[1::2])) if len(values) > 1 else None
    return Times(median, low, high, min(values), len(values), orders)


def _cpu_clock(phases: Phases) -> dict[str, float]:
    passed, start = {}, time.perf_counter()
    for name in phases():
        now = time.perf_counter()
        passed[name], start = now - start, now
    return passed


def _cuda_clock(device: torch.device, head_start: bool = False):
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def clock(phases: Phases) -> dict[str, float]:
        torch.cuda.synchronize(device)
        flush.zero_()
        if head_start:
            torch.cuda._sleep(HEAD_START)
        marks, names = [torch.cuda.Event(enable_timing=True)], []
        marks[0].record()
        for name in phases():
            names.append(name)
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        torch.cuda.synchronize(device)
        return {name: marks[i].elapsed_time(marks[i + 1]) / 1e3 for i, name in enumerate(names)}

    return clock
