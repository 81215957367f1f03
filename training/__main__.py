"""`python -m training`, `dora-train`: fine-tune with DoRA. Without a model and data of your own: the embedded demo."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with these command-line arguments. Exits non-zero, with a sentence, on bad input and if the run fails."""
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    from .flags import parse_flags
    from .spelling import resumed

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    flags, is_demo = parse_flags(arguments)
    transformers_logging.set_verbosity_error()
    again = resumed(arguments)
    # Imported once it is known which one: TRL takes seconds, and the demo does without it.
    try:
        if is_demo:
            from .minimal import demonstrate

            demonstrate.run(flags, again)
        else:
            import datasets

            from .finetune.run import run

            datasets.disable_progress_bars()
            run(flags, again)
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    from .commands import train

    train()
