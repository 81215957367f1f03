"""SIGTERM at random points of training. A case is a seed of `tests.support.kill_training` and `POINTS` stops."""

from .kills import interrupt
from .row import Record, Row, Verdict

POINTS = 25
TARGET = 50


def judge(records: list[Record]) -> Verdict:
    good = [record for record in records if record["failed"] is None]
    points = sum(record["points"] for record in good)
    return Verdict(f"{points} of {len(records) * POINTS}", points >= TARGET and len(good) == len(records))


ROW = Row(
    what="SIGTERM at random points: clean exit, exact resume",
    target="50 of 50",
    cases=lambda: map(str, range(TARGET // POINTS)),
    run=lambda seed: interrupt(seed, "--stops", POINTS),
    judge=judge,
)
