"""SIGTERM as a request to stop at the next step, after saving."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """`requested` becomes true when SIGTERM arrives."""

    requested = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """While open, SIGTERM no longer ends the process: whoever holds the request looks at it when it can stop."""
    request = StopRequest()

    def note(number, frame):
        request.requested = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
