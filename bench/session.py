"""What every measuring command shares: its flags, where it runs, its results file, its deadline."""

import argparse
import time
from pathlib import Path

import torch
import torch._dynamo

from .records import Records, default_path, stamp
from .shapes import PRESETS, Preset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="what is measured (default: tiny, for a try)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--threads", type=int, help="threads of a CPU run (default: PyTorch's own choice)")
    parser.add_argument("--output", type=Path, help="results file (default: bench/results/<device>.jsonl)")
    parser.add_argument("--commit", help="commit of this tree, where it is a copy without history")
    parser.add_argument("--minutes", type=float, help="start no further case after this long")
    parser.add_argument("--repetitions", type=int, help="timed repetitions per contestant (default: the preset's)")
    parser.add_argument("--again", action="store_true", help="measure also what the results file holds already")


class Session:
    """One run of a measuring command, or of several in a row."""

    def __init__(self, args: argparse.Namespace):
        if args.threads:
            torch.set_num_threads(args.threads)
        self.device = torch.device(args.device)
        self.preset: Preset = PRESETS[args.preset]
        self.repetitions = args.repetitions or self.preset.repetitions
        if self.preset.compiled:
            # Contestants share the code of their forward: beyond PyTorch's limit the rest would silently run eagerly.
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.fail_on_recompile_limit_hit = True
        self.stamp = stamp(self.device, args.commit)
        self.records = Records(args.output or default_path(self.stamp), self.stamp)
        self._again = args.again
        self._deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
        self._left = 0
        where = {name: value for name, value in self.stamp.items() if value is not None}
        print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)

    def skips(self, command: str, case: dict) -> bool:
        """Whether the case is done already, or the time is over."""
        if not self._again and self.records.has(command, case):
            return True
        if self._deadline and time.monotonic() > self._deadline:
            self._left += 1
            return True
        return False

    def finish(self) -> int:
        """The exit status; says what is left."""
        if self._left:
            print(f"the time is over with {self._left} cases left; the same command continues")
        print(f"results: {self.records.path}")
        return 0
