"""Row 8: PEFT's own DoRA tests with the engine in them.

A case is an engine: what passes on plain PEFT on this machine must pass on the reference and on the interpreted
kernels. The Hub is not asked: PEFT's tests that need it fail on plain PEFT too and count for neither, but for five that
get tiny random models of ours under the names they load.
"""

import functools
from collections import Counter
from pathlib import Path

from tests.peft_suite.__main__ import compare, read, source_distribution
from tests.peft_suite.__main__ import run as run_suite

from .row import Record, Row, Verdict, failures
from .suite import ROOT

FOLDER = Path("build/peft-suite")
ENGINES = ("reference", "triton")
WANTED = 727
"""Of PEFT 0.21.2's tests that `-k dora` selects, those that pass on plain PEFT without the Hub. Fewer is a suite that
did not run whole."""


def suite(engine: str) -> tuple[dict[str, str], Counter]:
    return read(run_suite(source_distribution(ROOT / FOLDER), engine, 2, "dora"))


@functools.cache
def plain() -> dict[str, str]:
    return suite("off")[0]


def run(case: str) -> dict:
    expected = [test for test, outcome in plain().items() if outcome == "passed"]
    outcomes, counts = suite(case)
    wrong = compare(case, plain(), outcomes, counts)
    assert not wrong, "; ".join(wrong)[:2000]
    return {
        "plain": len(expected),
        "passed": sum(outcomes.get(test) == "passed" for test in expected),
        "fused": counts["fused"],
        "launches": counts["launches"],
    }


def judge(records: list[Record]) -> Verdict:
    parts = [
        f"{record['case']}: {record['passed']} of the {record['plain']} that pass on plain PEFT without the Hub"
        if record["failed"] is None
        else f"{record['case']}: {record['failed'][:200]}"
        for record in records
    ]
    complete = [record["case"] for record in records] == list(ENGINES) and not failures(records)
    met = complete and all(record["passed"] == record["plain"] >= WANTED for record in records)
    return Verdict("; ".join(parts), met)


ROW = Row(
    what="PEFT's own suite with the engine in it, `-k dora`, without the Hub, five of its tests on tiny random models",
    target=f"what passes on plain PEFT, on both engines, and {WANTED} at least",
    cases=lambda: ENGINES,
    run=run,
    judge=judge,
)
