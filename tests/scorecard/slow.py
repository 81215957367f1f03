"""The tests that the suite leaves out, as what they prove costs seconds, and others of its kind stay in the suite."""

import re
from pathlib import Path

from .row import Record, Row, Verdict, failures

TESTS = Path(__file__).parents[1]
MARKED = re.compile(r"\bmark\.slow\b|\bslow\(")
LEAST = 20


def files() -> list[str]:
    """The test files in which a test is marked."""
    found = (path for path in TESTS.rglob("test_*.py") if MARKED.search(path.read_text(encoding="utf-8")))
    return sorted(str(path.relative_to(TESTS)) for path in found)


def run(file: str) -> dict:
    from .suite import outcomes

    found = outcomes("-m", "slow", f"tests/{file}")
    bad = {test: outcome for test, outcome in found.items() if outcome != "passed"}
    assert found and not bad, f"{bad or 'no test of it is marked'}"
    return {"tests": len(found)}


def judge(records: list[Record]) -> Verdict:
    failed = failures(records)
    passed = sum(record["tests"] for record in records if record["failed"] is None)
    return Verdict(
        f"{passed} tests in {len(records)} files, {len(failed)} files with failures", passed >= LEAST and not failed
    )


ROW = Row(
    what="the tests marked slow, which `make test` leaves out",
    target=f"≥ {LEAST}, 0 failures",
    cases=files,
    run=run,
    judge=judge,
)
