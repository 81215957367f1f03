"""What every measuring command shares: its flags, where it runs, its results file, its deadline."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo

from ..measuring import clocks
from ..measuring.shapes import PRESETS, Preset
from ..measuring.timing import ContextLost, attempt, release
from .compare import title
from .records import Records, default_path, stamp

EVERYBODY = "every contestant"
"""The one row of a case that failed as a whole."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="what is measured (default: tiny, for a try)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--threads", type=int, help="threads of a CPU run (default: PyTorch's own choice)")
    parser.add_argument("--output", type=Path, help="results file (default: out/bench/<device>.jsonl)")
    parser.add_argument("--commit", help="commit of this tree, where it is a copy without history")
    parser.add_argument("--minutes", type=float, help="start no case that would end after this long, as the last did")
    parser.add_argument("--repetitions", type=int, help="timed repetitions per contestant (default: the preset's)")
    parser.add_argument("--again", action="store_true", help="measure also what the results file holds already")


class Session:
    """One run of a measuring command, or of several in a row."""

    def __init__(self, args: argparse.Namespace):
        if args.threads:
            torch.set_num_threads(args.threads)
        self.device = torch.device(args.device)
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError(f"--device {args.device}: PyTorch sees no GPU here; use --device cpu")
            torch.cuda.set_device(self.device.index or 0)
        self.preset: Preset = PRESETS[args.preset]
        self.repetitions = args.repetitions or self.preset.repetitions
        if self.preset.compiled:
            # Contestants share the code of their forward: beyond PyTorch's limit the rest would silently run eagerly.
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.fail_on_recompile_limit_hit = True
        self.stamp = stamp(self.device, args.commit) | {"repetitions": self.repetitions}
        self.records = Records(args.output or default_path(self.stamp), self.stamp)
        self._again = args.again
        self._deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
        self.left = self.failed = 0
        self._took: dict[str, float] = {}  # by command, the seconds of its last case
        self.assumed = 0.0  # seconds of a command's first case
        where = {name: value for name, value in self.stamp.items() if value is not None}
        print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)

    def skips(self, command: str, case: dict) -> bool:
        """Whether the case is done already, or would not end before the time is over."""
        if not self._again and self.records.has(command, case):
            print(f"held already: {command}, {title(case)}", flush=True)
            return True
        if self._deadline and time.monotonic() + self._took.get(command, self.assumed) > self._deadline:
            self.left += 1
            return True
        return False

    def measure(self, command: str, case: dict, call: Callable[[], dict[str, dict]]) -> dict[str, dict] | None:
        """What `call` returns, recorded: a result by contestant; None, and one row for all, if the case itself failed.

        Raises:
            SystemExit: with 3, if the GPU's context is lost; the case is recorded, and not tried again.
        """
        print(f"\n{title(case)}", flush=True)
        if self.preset.compiled:
            torch._dynamo.reset()  # what other cases compiled counts against the limit
        started, before = time.monotonic(), clocks.read(self.device)
        try:
            results, failure = attempt(call)
        except ContextLost as lost:
            self.records.add(command, case, {EVERYBODY: {"failed": f"the GPU's context was lost by {lost}"}})
            print(f"the GPU's context was lost by {lost}; the same command continues with the next case")
            sys.exit(3)
        if failure:
            self.failed += 1
            print(f"the case itself failed: {failure}", flush=True)
        read = [before, clocks.read(self.device)] if before and not failure else None
        for row in (results or {}).values() if read else ():
            row["clocks"] = read
        self.records.add(command, case, results or {EVERYBODY: {"failed": failure}})
        release()
        self._took[command] = time.monotonic() - started
        print(f"{self._took[command]:.0f} s", flush=True)
        return results

    def finish(self) -> int:
        """The exit status, 1 if a case failed as a whole; says what is left."""
        if self.left:
            print(f"the time is over with {self.left} cases left; the same command continues")
        print(f"results: {self.records.path}")
        return int(self.failed > 0)
