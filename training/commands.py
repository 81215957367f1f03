"""The commands as processes: `dora-train`, `dora-merge`, `dora-export` and `dora-plan`, and `python -m training`.

Nothing is imported here that takes time, so Ctrl-C ends a command in one line from the start.
"""

import importlib
import sys

from .stopping import INTERRUPTED

EXTRA = {"accelerate", "datasets", "matplotlib", "peft", "tqdm", "trl", "yaml"}
"""What the extra `train` brings."""


def train() -> None:
    """`dora-train`."""
    _run("__main__")


def merge() -> None:
    """`dora-merge`."""
    _run("merge")


def export() -> None:
    """`dora-export`."""
    _run("export")


def plan() -> None:
    """`dora-plan`."""
    _run("plan")


def _run(module: str) -> None:
    """Run the module's `main`, and exit with its status."""
    status = None
    try:
        importlib.import_module(f".{module}", __package__).main()
    except SystemExit as stopped:
        status = stopped.code
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        status = f'error: this command needs {error.name}: pip install "dora-kernels[train]"'
    except KeyboardInterrupt as interrupted:
        print(f"\n{str(interrupted) or 'interrupted: nothing was done'}", file=sys.stderr)
        status = INTERRUPTED
    # Not in `main`, whose frames and errors hold the model.
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        from .distributed.processes import leave

        leave(failed=bool(status))
    sys.exit(status)
