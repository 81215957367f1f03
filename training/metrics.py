"""metrics.jsonl: one JSON object per line, `step` in each; and loss.png drawn from it."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from training.checkpoint import sync


def append_row(path: Path, row: dict) -> None:
    """Add one row. It is in the kernel's hands on return, so that killing this process does not lose it."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict]:
    """All rows; a last line that a kill cut short is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def keep_until(path: Path, step: int) -> None:
    """Drop the rows of later steps than the checkpoint that a run resumes from, so that no step is logged twice."""
    staged = path.with_name(f"{path.name}.tmp")
    with staged.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step)
    sync(staged)
    staged.rename(path)


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
