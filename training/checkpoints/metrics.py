"""metrics.jsonl: one JSON object per line, each with `step`."""

import json
from pathlib import Path

from dora_kernels.adapters.atomic import write_atomic

METRICS = "metrics.jsonl"


def append_row(path: Path, row: dict) -> None:
    """Add one row. The kernel has it when this returns, so killing the process does not lose it."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict]:
    """All rows. A last line without a newline, which a kill leaves, is ignored.

    Raises:
        ValueError: another line is damaged.
    """
    lines = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(
                f"{path}, line {number} is damaged, which no kill does: repair it, or move the file away to go on "
                "without what was logged"
            )
        rows.append(row)
    return rows


def keep_until(path: Path, step: int) -> None:
    """Drop the rows after `step`, the step of the checkpoint that a run resumes from; -1 drops all rows."""
    rows = read_rows(path) if step >= 0 else []
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
