"""An output folder belongs to one run, and to one process at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import list_checkpoints

LOCK = ".lock"


def check_folder(output_dir: Path, resume: bool) -> None:
    """Raise ValueError if it cannot be a folder, or a new run would write beside the checkpoints of another."""
    if reason := why_not_made(output_dir):
        raise ValueError(f"`--output_dir` {output_dir} cannot be a run's folder: {reason}")
    if not resume and (there := list_checkpoints(output_dir)):
        raise ValueError(
            f"{output_dir} holds {there[0].name} of an earlier run: "
            "continue it with --resume, or choose another --output_dir"
        )


def why_not_made(folder: Path) -> str | None:
    """Why nothing can be written into a folder, made if need be; None if it can."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    return f"{there} {'cannot be written to' if there.is_dir() else 'is no folder'}"


@contextmanager
def sole_run(output_dir: Path) -> Iterator[None]:
    """Lock the folder, made if need be, until the scope or the process ends.

    Raises:
        ValueError: another process holds the lock.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    # Without following a link, whose target is not the run's file.
    with open(output_dir / LOCK, "w", opener=lambda name, how: os.open(name, how | os.O_NOFOLLOW, 0o666)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing to {output_dir}: wait for it, or choose another --output_dir"
            ) from None
        yield
