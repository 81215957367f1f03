"""The frame of the smaller commands: flags from a dataclass, and bad input as one sentence."""

import os
import re
import sys
from collections.abc import Callable, Sequence

from safetensors import SafetensorError
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from .stopping import INTERRUPTED


class OneSentence(HfArgumentParser):
    """A mistake is said without the usage, in which it would drown."""

    def error(self, message: str) -> None:
        # argparse lists every spelling of a flag.
        message = re.sub(r"(--\w+)(?:/--[\w-]+)+", r"\1", message)
        self.exit(2, f"{self.prog}: error: {message}\n")


def command_line(flags: type, run: Callable, arguments: Sequence[str] | None, **described) -> None:
    """Parse `flags`, a dataclass, and call `run` with it. Exits non-zero, with a sentence, on bad input.

    Args:
        arguments: words of the command line; None takes those of the process.
        described: `prog` and `description` of the parser.
    """
    parser = OneSentence(flags, allow_abbrev=False, **described)
    transformers_logging.set_verbosity_error()
    try:
        run(flags(**expand_home(vars(parser.parse_args(arguments)))))
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        sys.exit(INTERRUPTED)


def expand_home(values: dict) -> dict:
    """The values with a leading `~` of a path replaced, which no shell does in a YAML file or behind `=`."""
    return {name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in values.items()}


def numbers_by_name(flag: str, text: str, kind: type) -> dict | None:
    """What `--rank_pattern` and `--alpha_pattern` say, `q_proj=32,v_proj=8`; None for nothing.

    Raises:
        ValueError: a part that is not `name=number`.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.rpartition("=")
        try:
            found[name] = kind(number)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"`--{flag}` {part} should be name=number, such as q_proj=32")
    return found or None


def module_names(text: str) -> list[str] | str:
    """What `--lora_target_modules` names: a list of module names, or "all-linear"."""
    names = [name.strip() for name in text.split(",")]
    return "all-linear" if names == ["all-linear"] else names
