"""Measures the rows of the reliability scorecard and prints them as a table.

    python -m tests.scorecard                 # every row: hours on two cores
    python -m tests.scorecard kills shim      # these
    python -m tests.scorecard --fast          # those that CI measures
    python -m tests.scorecard kills --write   # and put the line into tests/SCORECARD.md

An interrupted row goes on with the same command: what build/scorecard holds from the same commit is not measured again
(`--again` does). Exits with 1 if a row misses its target, and prints what failed.
"""

import argparse
import os
import platform
import sys
from pathlib import Path

# Before Triton is imported, as in conftest.py: the kernels of all rows run under the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy
import torch

from bench.rows.records import head, stamp
from tests.support import interpreter

from . import table
from .row import NAMES, failures, measure, module

STORE = Path("build/scorecard")
SHOWN = 5  # failures printed of each row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--fast", action="store_true", help="only the rows that take seconds")
    parser.add_argument("--write", action="store_true", help="write the lines into tests/SCORECARD.md")
    parser.add_argument("--again", action="store_true", help="measure what was measured before at this commit, too")
    asked = parser.parse_args()
    if unknown := set(asked.rows) - set(NAMES):
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    interpreter.install()
    torch.set_num_threads(1)  # as in conftest.py
    names = [name for name in asked.rows or NAMES if not asked.fast or module(name).ROW.fast]
    now = {name: value for name, value in stamp(torch.device("cpu")).items() if name != "load"}
    now |= {"python": platform.python_version(), "numpy": numpy.__version__}
    if not names:
        parser.error(f"none of {', '.join(asked.rows)} is a fast row")
    lines, missed = {}, False
    for name in names:
        row, path = module(name).ROW, STORE / f"{name}.jsonl"
        if asked.again:
            path.unlink(missing_ok=True)
        records = measure(name, row, path, now, head)
        verdict = row.judge(records)
        lines[name] = table.line(name, row, verdict, now)
        for record in failures(records)[:SHOWN]:
            print(f"{name}: {record['case']}: {record['failed']}", file=sys.stderr)
        missed |= not verdict.met
        if asked.write:
            table.write({name: lines[name]})
    print(*lines.values(), sep="\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
