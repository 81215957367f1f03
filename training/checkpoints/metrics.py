"""metrics.jsonl: one JSON object per line, `step` in each; loss.png drawn from it; and what a run costs."""

import json
import resource
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from .checkpoint import write_whole

METRICS = "metrics.jsonl"


class Meter:
    """Tokens per second between two readings, and the most memory used so far."""

    def __init__(self):
        self._time, self._tokens = time.perf_counter(), None

    def since_last(self, tokens: float) -> dict[str, float]:
        """`tokens_per_second`, given the tokens of the run so far (from the second reading), and `peak_memory_gb`."""
        now = time.perf_counter()
        before, elapsed = self._tokens, now - self._time
        self._time, self._tokens = now, tokens
        rate = {} if before is None else {"tokens_per_second": (tokens - before) / elapsed}
        return rate | {"peak_memory_gb": peak_memory() / 1e9}

    def leave_out(self) -> None:
        """What was done since the last reading was not training."""
        self._time = time.perf_counter()


def peak_memory() -> int:
    """Bytes: of the current GPU if there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def append_row(path: Path, row: dict) -> None:
    """Add one row. It is in the kernel's hands on return, so that killing this process does not lose it."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict]:
    """All rows; a last line that a kill cut short is left out. Raises ValueError for any other that is damaged."""
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
    """Drop the rows of later steps than the checkpoint that a run resumes from, so that no step is logged twice."""
    rows = read_rows(path) if step >= 0 else []
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))


def plot_losses(metrics: Path, image: Path) -> None:
    """Training loss per step, and held-out loss where it was measured."""
    rows = read_rows(metrics)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")  # not pyplot's: a file needs no display
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train), linewidth=0.8, label="training")
    if held_out:
        axes.plot(*zip(*held_out), marker="o", label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)", yscale="log", title="DoRA fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120)
