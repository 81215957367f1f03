"""The report's plots. Each function yields the paths of what it draws, none where there is nothing to show."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .kernels import COPY, GEMM, SLOWER
from .rows.compare import base_seconds, seconds, title
from .step import distances, reference_of

MARKERS = "osv^D*Pxh<>p"
COLORS = {
    "frozen base": "black",
    "PEFT LoRA": "tab:blue",
    "PEFT DoRA": "tab:red",
    "Axolotl": "tab:purple",
    "Unsloth": "tab:pink",
    "ours": "tab:green",
}
WINDOW = 20  # steps whose mean a distance between two noisy curves is
Groups = list[dict[str, dict]]


def plot_layers(groups: Groups, x: str, machine: str, path: Path) -> Iterator[Path]:
    """A layer's time, that over the frozen base's, and peak memory against `x`, "tokens" or "rank".

    One image per model and other size, which is added to the name of `path`; one row of panels per layer.
    """
    other = "rank" if x == "tokens" else "tokens"
    images: dict[tuple, dict[tuple, Groups]] = {}
    for group in groups:
        case = _case(group)
        key = (case["model"], case["dtype"], case["compiled"], case[other])
        panel = (case["layer"], case["out"], case["in"])
        images.setdefault(key, {}).setdefault(panel, []).append(group)
    for (model, dtype, compiled, value), panels in images.items():
        # A single point is no curve.
        panels = {panel: sorted(found, key=lambda g: _case(g)[x]) for panel, found in panels.items() if len(found) > 1}
        if not panels:
            continue
        figure = Figure(figsize=(13, 3 * len(panels) + 1.2), layout="constrained")
        figure.suptitle(f"{machine}: {model}, {dtype}{', compiled' if compiled else ''}, {other} {value}")
        rows = figure.subplots(len(panels), 3, squeeze=False)
        styles = _styles(name for found in panels.values() for group in found for name in group)
        for ((layer, N, K), found), axes in zip(panels.items(), rows):
            _draw_layer(axes, found, x, styles)
            axes[0].set(title=f"{layer}, {N} × {K}", ylabel="forward + backward, ms")
        lines = {line.get_label(): line for axes in rows for line in axes[0].get_lines()}
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize="small")
        named = "-".join([path.stem, model, *(["compiled"] if compiled else []), f"{other}-{value}"])
        drawn = path.with_name(f"{named}{path.suffix}")
        figure.savefig(drawn, dpi=80)
        yield drawn


def _draw_layer(axes, found: Groups, x: str, styles: dict[str, dict]) -> None:
    times, ratios, memory = axes
    for name, style in styles.items():
        rows = [(_case(group)[x], group, group[name]) for group in found if name in group and seconds(group[name])]
        times.plot([at for at, _, _ in rows], [seconds(row) * 1e3 for _, _, row in rows], **style)
        over = [(at, seconds(row) / base) for at, group, row in rows if (base := base_seconds(group))]
        ratios.plot([at for at, _ in over], [ratio for _, ratio in over], **style)
        held = [(at, row["peak_bytes"] / 2**20) for at, _, row in rows if row.get("peak_bytes")]
        memory.plot([at for at, _ in held], [peak for _, peak in held], **style)
    ratios.set(ylabel="time / frozen base's", yscale="log")
    times.set(yscale="log")
    memory.set(ylabel="peak memory, MiB", yscale="log")
    for axis in axes:
        axis.set(xlabel=x, xscale="log")
        sizes = [_case(group)[x] for group in found]
        axis.set_xticks(sizes, [f"{size // 1024}k" if size % 1024 == 0 else str(size) for size in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
        _spell_out(axis.yaxis)
        axis.tick_params(labelsize="small")
        axis.grid(alpha=0.3)


def _styles(names: Iterable[str]) -> dict[str, dict]:
    """One colour per library, a marker for each of its forms."""
    styles: dict[str, dict] = {}
    for name in dict.fromkeys(names):
        color = _color(name)
        marker = MARKERS[sum(style["color"] == color for style in styles.values()) % len(MARKERS)]
        styles[name] = {"color": color, "marker": marker, "label": name, "linewidth": 1, "markersize": 4}
    return styles


def _color(contestant: str) -> str:
    return next((color for prefix, color in COLORS.items() if contestant.startswith(prefix)), "tab:gray")


def _spell_out(axis) -> None:
    """1, 2, 5, 10 instead of powers of ten, of which a small range has none."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _case(group: dict[str, dict]) -> dict:
    return next(iter(group.values()))["case"]


def plot_roofline(groups: Groups, machine: str, path: Path) -> Iterator[Path]:
    """FLOP/s against FLOPs per byte for each kernel, under the roofs of the copy and the GEMM beside it."""
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
    gemm = max(sum(group[GEMM]["flops"].values()) / seconds(group[GEMM]) for group in groups)
    low, high = 1, 3 * gemm / copy
    axes.plot([low, gemm / copy, high], [low * copy, gemm, gemm], color="black", linewidth=1)
    # On a CPU the measured GEMM is fp32's own.
    if any("tf32x3" in row["flops"] and "bf16" in group[GEMM]["flops"] for group in groups for row in group.values()):
        slow = gemm / SLOWER["tf32x3"]
        axes.plot([slow / copy, high], [slow, slow], "--", color="black", linewidth=1)
        label = "fp32 precision: three tf32 products"
        axes.annotate(label, (slow / copy, slow), (0, 9), textcoords="offset points", fontsize="x-small")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs per byte",
        ylabel="FLOP/s",
        title=f"{machine}, under its copy and GEMM",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=110)
    yield path


def plot_memory(groups: Groups, machine: str, path: Path) -> Iterator[Path]:
    """Per case of a whole model's step a bar for each contestant: the frozen weights, and the peak beside them."""
    held = [{name: row for name, row in group.items() if row.get("peak_bytes")} for group in groups]
    held = [group for group in held if group]
    if not held:
        return
    heights = [len(group) + 2 for group in held]
    figure = Figure(figsize=(9, 0.26 * sum(heights) + 0.6), layout="constrained")
    figure.suptitle(machine)
    panels = figure.subplots(len(held), squeeze=False, height_ratios=heights)
    for group, axes in zip(held, panels[:, 0]):
        frozen = [row.get("frozen_bytes", 0) / 2**30 for row in group.values()]
        peaks = [row["peak_bytes"] / 2**30 for row in group.values()]
        axes.barh(list(group), frozen, color="lightgray", label="frozen weights")
        bars = axes.barh(list(group), peaks, left=frozen, color=[_color(name) for name in group])
        axes.bar_label(bars, [f"{peak:.1f}" for peak in peaks], padding=3, fontsize="small")
        axes.set_title(title({name: value for name, value in _case(group).items() if value}), fontsize="small")
        axes.set(xlabel="GiB: frozen weights in gray, and the peak of all else")
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.tick_params(labelsize="small")
    figure.savefig(path, dpi=80)
    yield path


def plot_losses(groups: Groups, machine: str, path: Path) -> Iterator[Path]:
    """Per case the loss curves of every run, and beside them their distance from the reference's, a running mean."""
    if not groups:
        return
    figure = Figure(figsize=(15, 4 * len(groups)), layout="constrained")
    for group, (curves, apart) in zip(groups, figure.subplots(len(groups), 2, squeeze=False)):
        for style, (name, row) in zip(itertools.cycle(("-", "--", ":")), group.items()):
            if not row.get("losses"):
                continue
            (line,) = curves.plot(range(1, len(row["losses"]) + 1), row["losses"], style, linewidth=1, label=name)
            found = distances(group, name)
            if name != reference_of(group) and len(found) >= WINDOW:
                means = [100 * fmean(found[at - WINDOW : at]) for at in range(WINDOW, len(found) + 1)]
                apart.plot(range(WINDOW, len(found) + 1), means, style, linewidth=1, color=line.get_color())
        case = _case(group)
        curves.set(xlabel="optimizer step", ylabel="loss (nats)", yscale="log")
        # Rows of old have neither a dtype nor a rate.
        more = [f"{name} {case[name]}" for name in ("dtype", "rate") if name in case]
        curves.set_title(", ".join([case["model"], f"rank {case['rank']}", *more, f"seed {case['seed']}"]))
        _spell_out(curves.yaxis)
        apart.set(xlabel="optimizer step", yscale="log")
        apart.set_ylabel(f"% from {reference_of(group)},\nmean of {WINDOW} steps")
        for axes in (curves, apart):
            axes.grid(alpha=0.3)
        curves.legend(fontsize="small")
    figure.suptitle(machine)
    figure.savefig(path, dpi=80)
    yield path
