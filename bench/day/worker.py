"""The process of a day that uses the GPU: runs the steps that are left, one after another, until its time is over."""

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

import torch

from ..measuring import clocks
from ..rows.session import EVERYBODY
from . import compile_ahead, rehearsal, report
from .folder import Folder, cache_of
from .session import DaySession
from .step import Step
from .steps import STEPS

REPORTING = 5.0  # seconds that are kept for the last report


class Day:
    """What steps are run with."""

    def __init__(self, folder: Folder, preset: str, seconds: float, rehearsed: bool):
        self.folder, self.preset, self.rehearsed = folder, preset, rehearsed
        self.device = torch.device("cuda", 0)
        self._deadline = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until this slice is over."""
        return self._deadline - time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--steps", nargs="+")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    end_with_parent()
    steps = [step for step in STEPS if args.steps is None or step.name in args.steps]
    if unknown := set(args.steps or ()) - {step.name for step in STEPS}:
        print(f"no step is called {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in STEPS)}")
        return 2
    with ExitStack() as stack:
        if args.rehearse:
            stack.enter_context(rehearsal.rehearsed())
        elif not torch.cuda.is_available():
            print("PyTorch sees no GPU here; `--rehearse` runs the day on a CPU, `python -m dora_kernels` says more")
            return 2
        day = Day(Folder(args.out), "rehearsal" if args.rehearse else "day", args.seconds, args.rehearse)
        day.folder.state["device"] = torch.cuda.get_device_name(day.device)
        day.folder.state["capability"] = list(torch.cuda.get_device_capability(day.device))
        return work(day, steps)


def end_with_parent() -> None:
    """Ends this process and what it started once the conductor is gone, which may be killed at any moment."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def work(day: Day, steps: list[Step]) -> int:
    """Runs the steps in order, each within its minutes, and then what is left of them. 1 if something failed."""
    record_death(day)
    print(f"{torch.cuda.get_device_name(0)}: {clocks.shown(clocks.read(day.device))}", flush=True)
    for within_box in (True, False):
        for step in steps:
            known = day.folder.step(step.name)
            if known["done"]:
                continue
            boxed = within_box and not day.rehearsed  # a rehearsal's order must not depend on the machine
            seconds = min(day.left - REPORTING, 60 * step.minutes - known["seconds"] if boxed else day.left)
            if seconds >= step.least:
                run(day, step, seconds)
            elif within_box and known["seconds"] == 0:
                print(f"\n== {step.name}: not begun, {max(0, day.left):.0f} s are left", flush=True)
    print(report.progress(day.folder), flush=True)
    return int(any(day.folder.step(step.name)["failed"] for step in steps))


def run(day: Day, step: Step, seconds: float) -> None:
    """Runs one step for so many seconds at most, and leaves the folder whole."""
    known = day.folder.step(step.name)
    known["cost"] = step.cost(day, known, compile_ahead.seconds_left(day))
    day.folder.save()
    print(f"\n== {step.name}: {step.title}\n   {known['cost']}; at most {seconds:.0f} s now", flush=True)
    began = time.monotonic()
    try:
        done = step.run(day, step, seconds)
        known["failed"] += done.failed
        known["left"], known["done"] = done.left, done.left == 0
    except Exception:
        # One step that is broken does not cost the others.
        traceback.print_exc()
        known["failed"] += 1
    finally:
        # Also where a lost context ends this process.
        known["seconds"] += time.monotonic() - began
        day.folder.save()
        leave_whole(day)
    spent, left = f"{known['seconds']:.0f} s so far", known["left"]
    print(f"   {step.name}: {spent}, {left} cases left, {known['failed']} failed", flush=True)


def leave_whole(day: Day) -> None:
    """Writes what is made of the rows; what fails here costs no measurement."""
    for write in (lambda: report.write(day.folder), lambda: day.folder.pack_kernels(cache_of(day.rehearsed))):
        try:
            write()
        except Exception:
            traceback.print_exc()


def record_death(day: Day) -> None:
    """What was running when the last process died of itself is a row that says so, and is not tried again."""
    running = day.folder.state["running"]
    if running is None:
        return
    step = next(step for step in STEPS if step.name == running["step"])
    records = DaySession(day, step, 60).records
    if not records.has(running["command"], running["case"]):
        why = f"the process died or was ended after {time.time() - running['since']:.0f} s"
        records.add(running["command"], running["case"], {EVERYBODY: {"failed": why}})
    day.folder.state["deaths"].append(running)
    known = day.folder.step(step.name)
    known["cases"] += 1
    known["failed"] += 1
    day.folder.end()


if __name__ == "__main__":
    sys.exit(main())
