"""Row 19: the whole suite in random order, five times; and the tests of two processes, twenty times beside load.

A case of a suite is one whole run; its number seeds the order (pytest-random-order, which does nothing unless asked).
Tests of a module stay together, as fixtures of modules are expensive, but modules and the tests in them are shuffled;
two workers then take them as they come. What fails here alone is a flake, or leans on what ran before it.

A case of two processes runs the files that start them while each core has another process to run. Threads of gloo then
come late, also to the end of their process.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from .row import Record, Row, Verdict
from .suite import outcomes

SUITES = [str(seed) for seed in range(1, 6)]
PAIRS = [f"two processes {number}" for number in range(1, 21)]
FILES = ["tests/training/test_processes.py", "tests/training/test_sharded.py"]
SECONDS = 3600
# It ends with the process that started it, however that one ends.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**6))"


def shuffled(seed: str) -> list[str]:
    """pytest's options."""
    return ["--random-order-bucket=module", f"--random-order-seed={seed}"]


@contextmanager
def load() -> Iterator[list[subprocess.Popen]]:
    """Inside the scope as many other processes are busy as there are cores."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count())]
    try:
        yield busy
    finally:
        for process in busy:
            process.kill()
            process.wait()


def run(case: str) -> dict:
    suite = case in SUITES
    words = ["-n", "2", *shuffled(case)] if suite else ["-n", "0", *FILES]
    with nullcontext() if suite else load():
        found = outcomes(*words, timeout=SECONDS)
    broken = {test: outcome for test, outcome in found.items() if outcome in ("failed", "not loaded")}
    assert not broken, f"{f'with seed {case}' if suite else case}: {broken}"
    return dict(Counter(found.values()))


def judge(records: list[Record]) -> Verdict:
    parts, met = [], [record["case"] for record in records] == [*SUITES, *PAIRS]
    for name, cases in (("suites", SUITES), ("runs of two processes", PAIRS)):
        runs = [record for record in records if record["case"] in cases]
        green = [record for record in runs if record["failed"] is None]
        counts = sorted({record["passed"] for record in green})
        parts.append(
            f"{len(green)} of {len(runs)} {name} without a failure, {' / '.join(map(str, counts))} tests in each"
        )
        # As many tests in each: one that vanished did not pass.
        met &= len(green) == len(runs) and len(counts) == 1
    named = "; ".join(record["failed"] for record in records if record["failed"] is not None)
    return Verdict("; ".join(parts) + (f"; failed {named[:300]}" if named else ""), met)


ROW = Row(
    what="the whole suite in random order; two processes beside load",
    target=f"{len(SUITES)} suites and {len(PAIRS)} runs, no flake",
    cases=lambda: [*SUITES, *PAIRS],
    run=run,
    judge=judge,
)
