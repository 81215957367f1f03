"""How often a run is evaluated, and on how many rows, where `--eval_step` does not say."""

import math
import random
from dataclasses import dataclass

SHARE = 0.1
"""What all evaluations together may cost, as a share of training."""
STEP = 2
"""What a row costs in training, in forward passes: the base's weights take no gradient."""
MOST = 20  # evaluations of a run, at most


@dataclass(frozen=True)
class Evaluations:
    """Evaluate every `period` steps, on `rows` of the held-out rows; 0 for never."""

    period: int
    rows: int


def planned(eval_step: int | None, *, held_out: int, steps: int, batch: int) -> Evaluations:
    """As often as asked, on all rows; or as often, and on as many, as cost `SHARE` of training.

    Args:
        eval_step: what the user asked for; None for nothing.
        held_out: rows to evaluate on.
        steps: optimizer steps of the run, of `batch` rows each.
    """
    if not held_out or eval_step == 0:
        return Evaluations(0, 0)
    if eval_step:
        return Evaluations(eval_step, held_out)
    forwards = SHARE * STEP * steps * batch
    # One of the base, and one at the end.
    rows = max(1, min(held_out, int(forwards / 2)))
    times = max(1, min(MOST, int(forwards / rows) - 1))
    return Evaluations(math.ceil(steps / times), rows)


def chosen_rows(held_out: int, rows: int, seed: int) -> list[int]:
    """Which of the held-out rows are evaluated on; the same in a resumed run."""
    return sorted(random.Random(f"{seed}/evaluation").sample(range(held_out), rows))


def note(found: Evaluations, *, held_out: int, asked: bool) -> str:
    """What the log says."""
    if asked or not found.period:
        return ""
    some = f"{found.rows} of the {held_out} held-out rows" if found.rows < held_out else f"all {held_out} held-out rows"
    return (
        f"evaluated every {found.period} steps on {some}, so that it costs at most {SHARE:.0%} of training; "
        "--eval_step N evaluates on all of them every N steps"
    )
