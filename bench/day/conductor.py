"""One slice of a day: runs workers until the time is over, and ends those that hang. It never touches the GPU."""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from ..installation import PACKAGE, ROOT
from .folder import REPORT, THRESHOLDS, Folder, cache_of, commit_of_tree

GRACE = 20.0  # seconds that a worker may take to stop beyond its time
SHORTEST = 20.0  # seconds: for less no worker is started, which takes as long to import
HANGS = 300.0  # seconds without the end of a case; the longest takes half of it
DEATHS = 5  # workers that may die in one slice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="the day's folder; an earlier slice's goes on")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this slice (default: %(default)s)")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="only these steps (default: all that is left)")
    parser.add_argument("--commit", help="commit of this tree, where it is a copy without history")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: write report and constants again, by four roofs"
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU that stands in for a GPU, in small")


def main(args: argparse.Namespace) -> int:
    began = time.monotonic()
    folder = Folder(args.out)
    if args.report:
        return report_again(folder)
    if not (ROOT / "tests").is_dir():
        print("the day runs the tests too, which stand in a clone alone: run `python -m bench day` there")
        return 2
    commit = args.commit or commit_of_tree()
    if folder.state["commit"] not in (None, commit):
        print(f"{args.out} holds a day of {folder.state['commit']}, this tree is {commit}: use another folder")
        return 2
    folder.clean()
    folder.state["commit"] = commit
    # A slice that was cut from outside says nothing against the case that was running.
    folder.state["running"] = None
    folder.state["slices"].append({"minutes": args.minutes, "began": time.time()})
    folder.save()
    folder.unpack_kernels(cache_of(args.rehearse))
    say(folder, f"slice {len(folder.state['slices'])}: {args.minutes:g} minutes, commit {commit}\n")
    code, deaths = 0, 0
    while deaths < DEATHS:
        left = 60 * args.minutes - (time.monotonic() - began)
        if left < SHORTEST:
            say(folder, "the time of this slice is over; the same command goes on\n")
            break
        code = work(folder, args, left)
        if code in (0, 1, 2):
            break
        deaths += 1
        say(folder, f"a worker ended with {code}; another goes on after the case that was running\n")
    return code


def report_again(folder: Folder) -> int:
    """From the folder's results alone, on any machine: what limits each launch is read from its compiled code."""
    from ..counting.roofs import longest
    from ..offline import check_compilable
    from . import report, thresholds

    if not check_compilable():
        return 2
    thresholds.write(folder, longest)
    report.write(folder, longest)
    print(f"wrote {folder.path / REPORT} and {folder.path / THRESHOLDS}")
    return 0


def say(folder: Folder, text: str) -> None:
    """To the screen and the log."""
    print(text, end="", flush=True)
    folder.log(text)


def work(folder: Folder, args: argparse.Namespace, seconds: float) -> int:
    """Runs one worker to its end, or ends it; what it exits with, negative for a signal."""
    command = [
        sys.executable,
        "-m",
        f"{PACKAGE}.day.worker",
        "--out",
        str(args.out.resolve()),
        "--seconds",
        f"{seconds:.1f}",
    ]
    command += ["--rehearse"] if args.rehearse else []
    command += ["--steps", *args.steps] if args.steps else []
    # Triton reads both when it is imported.
    environment = {
        "TRITON_CACHE_DIR": str(cache_of(args.rehearse)),
        "TRITON_INTERPRET": "1" if args.rehearse else "0",
        "PYTHONUNBUFFERED": "1",
    }
    worker = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=os.setpgrp,  # a group of its own, so that what it starts ends with it
    )  # fmt: skip
    reader = threading.Thread(target=lambda: [say(folder, line) for line in worker.stdout], daemon=True)
    reader.start()
    deadline = time.monotonic() + seconds + GRACE
    try:
        while worker.poll() is None:
            time.sleep(0.1)
            if time.monotonic() > deadline:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
                Folder(args.out).end()  # its time is over: the case that was running is tried again
            # The interpreter's cases may take long where others work on the same cores.
            elif hangs(args.out) and not args.rehearse:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    reader.join(timeout=5)
    return worker.returncode


def hangs(path: Path) -> bool:
    """Whether one case has been running for too long."""
    running = Folder(path).state["running"]
    return running is not None and time.time() - running["since"] > HANGS
