"""loss.png: the loss curve, drawn from metrics.jsonl."""

from pathlib import Path

from matplotlib.figure import Figure

from .metrics import read_rows


def plot_losses(metrics: Path, image: Path, title: str) -> None:
    """Training loss by step, and held-out loss where it was measured. `title` says what was trained."""
    rows = read_rows(metrics)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")  # pyplot's figures would need a display
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train), linewidth=0.8, label="training")
    if held_out:
        axes.plot(*zip(*held_out), marker="o", label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss", title=title)
    # Preferences have losses that may reach zero.
    if all(loss > 0 for _, loss in train + held_out):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120)
