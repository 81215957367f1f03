"""Kills and stops training at random moments, resumes it, and compares it with a run that nobody touched.

    python -m tests.support.kill_training --points 100 --stops 100 --seed 0

One process imports everything once and forks a child per attempt; `--points` of them get SIGKILL, `--stops` SIGTERM.
Every other kill waits for a save to begin and strikes at a random moment of it; kills go on until one was in a save.
A chain of attempts ends when a run has finished: its losses and its adapter must be those of the untouched run, bit
for bit. Exits non-zero otherwise, and if a kill cost more than `SAVE_STEP` steps.
"""

import argparse
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from tests.support.training_runs import arguments, demo_rows, metrics, numbers, one_layer_base, write_rows
from training.__main__ import main as train
from training.checkpoints.checkpoint import newest_checkpoint, step_of
from training.checkpoints.lock import LOCK
from training.finetune import run  # noqa: F401  (imported before forking, so that children start at once)

SAVE_STEP = 2
WEIGHTS = "adapter_model.safetensors"
# 26 rows in batches of 2 are 13 steps an epoch: saves fall inside epochs, and dropout needs the generators.
FLAGS = {"max_steps": None, "num_epochs": 2, "save_step": SAVE_STEP, "eval_step": 5, "val_set_size": 4}
FLAGS |= {"lora_dropout": 0.2}


def start(words: list[str], log: Path) -> int:
    """The id of a child that trains with these words; what it prints goes to `log`."""
    if child := os.fork():
        return child
    status = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        train(words)
        status = 0
    except BaseException as error:  # SystemExit too: the child must not return into its parent's code
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_until(child: int, condition) -> int | None:
    """None once `condition()` holds; the child's status if it ends before that."""
    while not condition():
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.0005)
    return None


def saving(out: Path) -> bool:
    """Whether a save into `out` has begun and not ended, or was cut."""
    return any(out.glob(".tmp-*"))


def save_time(child: int, out: Path) -> tuple[float, int]:
    """The seconds that the child's shortest save took, and its status at its end."""
    shortest = float("inf")
    while (status := wait_until(child, lambda: saving(out))) is None:
        began = time.perf_counter()
        status = wait_until(child, lambda: not saving(out))
        shortest = min(shortest, time.perf_counter() - began)
        if status is not None:
            break
    return shortest, status


class Harness:
    """Chains of interrupted attempts in `folder`, each against one untouched run."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.data = write_rows(folder / "rows.jsonl", demo_rows(30))
        self.base = one_layer_base(folder / "base")
        started = time.perf_counter()
        child = start(self.words(folder / "whole"), folder / "log")
        self.save_seconds, status = save_time(child, folder / "whole")
        self.check(status == 0 and self.save_seconds < float("inf"), "the untouched run failed or never saved")
        self.seconds = time.perf_counter() - started
        self.whole = metrics(folder / "whole")

    def words(self, out: Path, *bare: str) -> list[str]:
        return arguments(self.data, out, *bare, **FLAGS, base_model=self.base)

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            raise SystemExit(f"{what}; the last child said:\n{(self.folder / 'log').read_text()}")

    def chains(self, number: int, points: int) -> dict[str, int]:
        """Interrupts attempts with signal `number`, at least `points` of them, and finishes the last chain."""
        done = {"points": 0, "chains": 0, "in a save": 0, "most steps lost": 0}

        def enough() -> bool:
            return done["points"] >= points and (number != signal.SIGKILL or done["in a save"] > 0)

        while not enough():
            out = self.folder / f"chain-{number}-{done['chains']}"
            while not self.attempt(out, 0 if enough() else number, done):
                pass
            self.compare(out)
            shutil.rmtree(out)
            done["chains"] += 1
        return done

    def attempt(self, out: Path, number: int, done: dict[str, int]) -> bool:
        """One child, interrupted if `number` is a signal. Whether the run is finished."""
        before = locked(out)
        child = start(self.words(out, "--resume"), self.folder / "log")
        if number == signal.SIGKILL and done["points"] % 2:
            status = wait_until(child, lambda: saving(out))
            delay = self.random.uniform(0, self.save_seconds)
        else:
            # The handler of SIGTERM stands from the moment the folder is locked.
            status = wait_until(child, lambda: locked(out) > before) if number == signal.SIGTERM else None
            delay = self.random.uniform(0, self.seconds / (2 if number == signal.SIGTERM else 1))
        if status is None and number:
            deadline = time.perf_counter() + delay
            status = wait_until(child, lambda: time.perf_counter() >= deadline)
        if status is None:
            if number:
                os.kill(child, number)
            _, status = os.waitpid(child, 0)
        finished = (out / WEIGHTS).exists() and os.waitstatus_to_exitcode(status) == 0
        if number == signal.SIGKILL and os.WIFSIGNALED(status):
            done["points"] += 1
            done["in a save"] += saving(out)
            logged = max((row["step"] for row in read(out)), default=0)
            newest = newest_checkpoint(out, report=lambda text: self.check(False, f"a damaged checkpoint: {text}"))
            lost = logged - (step_of(newest) if newest else 0)
            done["most steps lost"] = max(lost, done["most steps lost"])
            self.check(lost <= SAVE_STEP, f"a kill cost {lost} steps")
            return False
        self.check(status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}")
        if number == signal.SIGTERM and not finished:
            done["points"] += 1
            self.check("continue with" in (self.folder / "log").read_text(), "no resume command was printed")
        return finished

    def compare(self, out: Path) -> None:
        losses, expected = ([row for row in numbers(rows) if "loss" in row] for rows in (metrics(out), self.whole))
        self.check(losses == expected, f"the losses of {out} are not those of the untouched run")
        # A stop does not wait for the evaluation that is due at its step.
        evaluations = [row for row in numbers(metrics(out)) if "eval_loss" in row]
        self.check(all(row in numbers(self.whole) for row in evaluations), f"an evaluation of {out} differs")
        same = (out / WEIGHTS).read_bytes() == (self.folder / "whole" / WEIGHTS).read_bytes()
        self.check(same, f"the adapter of {out} differs")


def locked(out: Path) -> int:
    """When the folder was last locked; the file stays behind, as after any crash, and must not be in the way."""
    return (out / LOCK).stat().st_mtime_ns if (out / LOCK).exists() else 0


def read(out: Path) -> list[dict]:
    return metrics(out) if (out / "metrics.jsonl").exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--stops", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # a fork does not take threads along
    # tqdm's own is a semaphore that all children share, and that a killed one never gives back.
    tqdm.set_lock(threading.RLock())
    gc.freeze()  # what is imported need not be looked through in every child
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), asked.seed)
        for number, points in ((signal.SIGKILL, asked.points), (signal.SIGTERM, asked.stops)):
            started = time.perf_counter()
            done = harness.chains(number, points)
            seconds = time.perf_counter() - started
            print(number.name, ", ".join(f"{name}: {count}" for name, count in done.items()), f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
