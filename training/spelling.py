"""How the commands are spelled by whoever runs them: `dora-merge`, or `python -m training.merge` in a clone."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .distributed.processes import local_processes

PACKAGE = __package__
"""`training` in a clone, `dora_training` where it is installed."""


def spelled(module: str = "") -> str:
    """The command that runs `module`, "merge" for one; "" is training itself."""
    if Path(sys.argv[0]).name.startswith("dora-"):
        return f"dora-{module or 'train'}"
    return f"python -m {PACKAGE}.{module}" if module else f"python -m {PACKAGE}"


def resumed(arguments: Sequence[str]) -> str:
    """The command line that continues a run with these arguments, in as many processes."""
    processes = local_processes()
    command = f"torchrun --nproc_per_node {processes} -m {PACKAGE}" if processes else spelled()
    return f"{command} {shlex.join([*(word for word in arguments if word != '--resume'), '--resume'])}"
