"""Row 19: the whole suite in random order, five times.

A case is one whole run; its number seeds the order (pytest-random-order, which does nothing unless asked). Tests of a
module stay together, as fixtures of modules are expensive, but modules and the tests in them are shuffled; two workers
then take them as they come. What fails here alone is a flake, or leans on what ran before it.
"""

from collections import Counter

from .row import Record, Row, Verdict
from .suite import outcomes

RUNS = 5
SECONDS = 3600


def shuffled(seed: str) -> list[str]:
    """pytest's options."""
    return ["--random-order-bucket=module", f"--random-order-seed={seed}"]


def run(case: str) -> dict:
    found = outcomes("-n", "2", *shuffled(case), timeout=SECONDS)
    broken = {test: outcome for test, outcome in found.items() if outcome in ("failed", "not loaded")}
    assert not broken, f"with seed {case}: {broken}"
    return dict(Counter(found.values()))


def judge(records: list[Record]) -> Verdict:
    green = [record for record in records if record["failed"] is None]
    counts = sorted({record["passed"] for record in green})
    named = "; ".join(record["failed"] for record in records if record["failed"] is not None)
    measured = (
        f"{len(green)} of {len(records)} runs without a failure, {' / '.join(map(str, counts))} tests passed in each"
    )
    # As many tests in each: one that vanished did not pass.
    met = len(green) == len(records) == RUNS and len(counts) == 1
    return Verdict(measured + (f"; failed {named[:300]}" if named else ""), met)


ROW = Row(
    what="the whole suite in random order",
    target=f"{RUNS} runs, no flake",
    cases=lambda: map(str, range(1, RUNS + 1)),
    run=run,
    judge=judge,
)
