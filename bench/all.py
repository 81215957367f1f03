"""Runs `kernels`, `layer`, `block`, `experts` and `model` of one preset in a row, into one results file.

    python -m bench all --preset h200 --minutes 9

What `--minutes` do not reach is left to the same command, run again.
"""

import argparse

from . import block, experts, kernels, layer, model
from .rows.session import Session
from .rows.session import add_arguments as add_session_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_arguments(parser)


def main(args: argparse.Namespace) -> int:
    session = Session(args)
    for command in (kernels, layer, block, experts, model):
        print(f"\n== {command.COMMAND}", flush=True)
        command.run(session)
    return session.finish()
