"""Speed and memory of a run."""

import resource
import time

import torch


class Meter:
    """Tokens per second between two readings, and the peak memory so far."""

    def __init__(self):
        self._time, self._tokens = time.perf_counter(), None

    def read(self, tokens: float) -> dict[str, float]:
        """`tokens_per_second` since the last reading, and `peak_memory_gb`.

        `tokens` is the number of tokens of the run so far. The first reading has no `tokens_per_second`.
        """
        now = time.perf_counter()
        before, elapsed = self._tokens, now - self._time
        self._time, self._tokens = now, tokens
        rate = {} if before is None else {"tokens_per_second": (tokens - before) / elapsed}
        return rate | {"peak_memory_gb": peak_memory() / 1e9}

    def skip(self) -> None:
        """Do not count the time since the last reading: it was spent on saving or evaluating."""
        self._time = time.perf_counter()


def peak_memory() -> int:
    """Peak memory in bytes: of the current GPU if there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
