"""`kill -9` at random points of training. A case is a seed of `tests.support.kill_training` and `POINTS` kills;
half of them strike while a checkpoint is being written."""

import re
import subprocess
import sys

from .row import Record, Row, Verdict

POINTS = 25
TARGET = 500


def interrupt(seed: str, option: str, points: int) -> dict:
    """What `tests.support.kill_training` did with `points` interruptions of the kind that `option` counts."""
    counts = {"--points": 0, "--stops": 0} | {option: points}
    words = [word for name, count in counts.items() for word in (name, str(count))]
    command = [sys.executable, "-m", "tests.support.kill_training", "--seed", seed, *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if ended.returncode:
        said = re.search(r".*; the last child said", ended.stderr)
        raise RuntimeError(f"{said[0] if said else 'it failed'}: {ended.stderr[-1500:]}")
    line = ended.stdout.splitlines()[["--points", "--stops"].index(option)]
    done = counts_in(line)
    assert done["points"] == points, line
    return done


def counts_in(line: str) -> dict[str, int]:
    """The counts in a line that `tests.support.kill_training` prints: `SIGKILL points: 25, in a save: 12, …`."""
    return {name: int(count) for name, count in re.findall(r"(\w[a-z ]*): (\d+)", line.partition(" ")[2])}


def judge(records: list[Record]) -> Verdict:
    good = [record for record in records if record["failed"] is None]
    points, saving = (sum(record[name] for record in good) for name in ("points", "in a save"))
    lost = max((record["most steps lost"] for record in good), default=0)
    text = f"{points} of {len(records) * POINTS}, {saving} of them in a save; at most {lost} steps were done again"
    met = points >= TARGET and saving >= TARGET // 10 and len(good) == len(records)
    return Verdict(text, met)


ROW = Row(
    what="`kill -9` at random points of training, resumed to bit-identical loss lists",
    target="500 of 500",
    cases=lambda: map(str, range(TARGET // POINTS)),
    run=lambda seed: interrupt(seed, "--points", POINTS),
    judge=judge,
)
