"""Stopping a run by a signal: SIGTERM or one Ctrl-C saves it first, a second Ctrl-C ends it at once."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells count it."""
# torchrun hands its Ctrl-C on to processes that the terminal has interrupted already.
REPEATED = 1.0  # seconds


class StopRequest:
    """`requested` becomes True when a signal asks the run to save and stop. The training loop reads it."""

    requested = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Inside the scope SIGTERM does not end the process; it sets `requested`."""
    request = StopRequest()

    def on_signal(number, frame):
        request.requested = True

    with _handled(signal.SIGTERM, on_signal):
        yield request


@contextmanager
def stop_on_interrupt(request: StopRequest) -> Iterator[None]:
    """Inside the scope the first Ctrl-C sets `requested`, and says so; a later one raises KeyboardInterrupt."""
    process, first = os.getpid(), None

    def on_signal(number, frame):
        nonlocal first
        if first is not None and time.monotonic() - first > REPEATED:
            raise KeyboardInterrupt
        if first is None and os.getpid() == process:  # a data loader's workers inherit the handler
            # Not by `print`, which may be what the signal interrupted.
            os.write(2, b"\nstopping: the step is finished and saved first; Ctrl-C again aborts at once\n")
        first = first or time.monotonic()
        request.requested = True

    with _handled(signal.SIGINT, on_signal):
        yield


@contextmanager
def _handled(number: int, handler) -> Iterator[None]:
    before = signal.getsignal(number)
    if before == signal.SIG_IGN:  # as a shell starts what runs in the background
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
