"""`python -m training`: fine-tune with DoRA. Without a model and data of your own: the embedded demo."""

import shlex
import sys
from collections.abc import Sequence

import torch.distributed as dist
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from .flags import parse_flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with these command-line arguments. Exits non-zero, with a sentence, on bad input and if the run fails."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    flags, is_demo = parse_flags(arguments)
    transformers_logging.set_verbosity_error()
    # Imported once it is known which one: TRL takes seconds, and the demo does without it.
    try:
        if is_demo:
            from .minimal import demonstrate

            demonstrate.run(flags)
        else:
            import datasets

            from .finetune.run import run

            datasets.disable_progress_bars()
            words = [word for word in arguments if word != "--resume"]
            run(flags, shlex.join(["python", "-m", "training", *words]))
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    status = None
    try:
        main()
    except SystemExit as stopped:
        status = stopped.code
    # Not in `main`, whose frames and errors hold the model.
    if dist.is_initialized():
        from .distributed.processes import leave

        leave(failed=bool(status))
    sys.exit(status)
