"""The report's plots. Each function draws one file and yields its path, or nothing where there is nothing to show."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from .compare import seconds
from .kernels import COPY, GEMM

MARKERS = "osv^D*Pxh<>p"
Groups = list[dict[str, dict]]


def plot_layers(groups: Groups, x: str, machine: str, path: Path) -> Iterator[Path]:
    """Time and peak memory of a layer against `x`, "tokens" or "rank": one row of panels per layer and other size."""
    other = "rank" if x == "tokens" else "tokens"
    panels: dict[tuple, Groups] = {}
    for group in groups:
        case = next(iter(group.values()))["case"]
        key = (case["model"], case["layer"], case["out"], case["in"], case["dtype"], case["compiled"], case[other])
        panels.setdefault(key, []).append(group)
    # A single point is no curve.
    panels = {key: found for key, found in panels.items() if len(found) > 1}
    if not panels:
        return
    figure = Figure(figsize=(13, 4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 2, squeeze=False)
    for (key, found), (times, memory) in zip(panels.items(), axes):
        model, layer, N, K, dtype, compiled, value = key
        found.sort(key=lambda group: next(iter(group.values()))["case"][x])
        names = dict.fromkeys(name for group in found for name in group)
        for marker, name in zip(MARKERS * 3, names):
            rows = [(group[name]["case"][x], group[name]) for group in found if name in group and seconds(group[name])]
            style = {"marker": marker, "label": name, "linewidth": 1, "markersize": 4}
            times.plot([at for at, _ in rows], [seconds(row) * 1e3 for _, row in rows], **style)
            held = [(at, row["peak_bytes"] / 2**20) for at, row in rows if row.get("peak_bytes")]
            memory.plot([at for at, _ in held], [peak for _, peak in held], **style)
        where = f"{model} {layer} {N}×{K}, {dtype}, {other} {value}{', compiled' if compiled else ''}"
        times.set(title=where, ylabel="forward + backward, ms")
        memory.set(title=machine, ylabel="peak memory, MiB")
        for axis in (times, memory):
            axis.set(xlabel=x, xscale="log", yscale="log")
            axis.grid(alpha=0.3)
        memory.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    yield path


def plot_roofline(groups: Groups, machine: str, path: Path) -> Iterator[Path]:
    """FLOP/s against FLOPs per byte for each kernel, under the roofs that its run measured."""
    groups = [group for group in groups if seconds(group.get(COPY)) and seconds(group.get(GEMM))]
    if not groups:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for marker, name in zip(MARKERS, [name for name in groups[0] if name not in (COPY, GEMM)]):
        points = []
        for group in groups:
            row = group.get(name)
            flops = sum(row["flops"].values()) if row else 0
            if flops and seconds(row):
                points.append((flops / row["memory_bytes"], flops / seconds(row)))
        if points:
            axes.scatter(*zip(*points), marker=marker, s=18, label=name)
    copy = max(group[COPY]["memory_bytes"] / seconds(group[COPY]) for group in groups)
    gemm = max(group[GEMM]["flops"]["bf16"] / seconds(group[GEMM]) for group in groups)
    low, high = 0.5, 2 * gemm / copy
    axes.plot([low, gemm / copy, high], [low * copy, gemm, gemm], color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="FLOP/s", title=f"{machine}, roofs measured")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    yield path


def plot_losses(groups: Groups, machine: str, path: Path) -> Iterator[Path]:
    """The loss curves of every run, one panel per case."""
    if not groups:
        return
    figure = Figure(figsize=(8, 4 * len(groups)), layout="constrained")
    for group, axes in zip(groups, figure.subplots(len(groups), 1, squeeze=False)[:, 0]):
        for style, (name, row) in zip(("-", "-", "--", ":"), group.items()):
            if row.get("losses"):
                axes.plot(range(1, len(row["losses"]) + 1), row["losses"], style, label=name)
        case = next(iter(group.values()))["case"]
        axes.set(xlabel="optimizer step", ylabel="loss (nats)", yscale="log")
        axes.set_title(f"{case['model']}, rank {case['rank']}, seed {case['seed']}; {machine}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
    yield path
