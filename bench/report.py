"""Makes the README's tables and the plots from result files, by default all that are committed. It measures nothing.

Every contestant of a case is in the tables, those that failed and those where ours is slower included.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from .installation import LOCAL, RESULTS
from .kernels import kernels_table
from .plots import plot_layers, plot_losses, plot_memory, plot_roofline
from .rows.compare import base_seconds, group_table, is_noise, lora_seconds, seconds, title
from .rows.records import groups, read_rows
from .rows.tables import ratio, table
from .step import curves_table

COMMANDS = ("layer", "block", "experts", "model", "step", "kernels")
OURS = ("ours fp32, auto", "ours fp32, auto, compiled")
"""What a user gets who asks for no form."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, help="result files (default: all that are committed)")
    parser.add_argument("--local", action="store_true", help="what was measured here, in out/bench")
    parser.add_argument("--full", action="store_true", help="every case's whole table, not only the summary")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the plots into this folder")


def main(args: argparse.Namespace) -> int:
    folder = LOCAL if args.local else RESULTS
    files = args.files or sorted(folder.glob("*.jsonl"))
    if not files:
        print(f"there are no results in {folder}")
        return 2
    found = groups(read_rows(files))
    for machine in dict.fromkeys(map(machine_of, found)):
        here = [group for group in found if machine_of(group) == machine]
        print(f"\n### {machine}\n")
        for command in COMMANDS:
            some = [group for group in here if first(group)["command"] == command]
            if some:
                print(f"`{command}`, {software(some)}\n\n{section(command, some, args.full)}\n")
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        for drawn in draw(found, args.plots):
            print(drawn)
    return 0


def first(group: dict[str, dict]) -> dict:
    return next(iter(group.values()))


def machine_of(group: dict[str, dict]) -> str:
    stamp = first(group)["stamp"]
    threads = f", {stamp['threads']} thread{'s' * (stamp['threads'] > 1)}" if stamp["threads"] else ""
    return f"{stamp['kind']}: {stamp['device']}{threads}"


def software(some: list[dict[str, dict]]) -> str:
    """What the rows were measured with; more than one of a kind is said."""
    stamps = [first(group)["stamp"] for group in some]
    names = ("driver", "torch", "triton", "peft", "commit", "date")
    values = {name: dict.fromkeys(str(stamp[name]) for stamp in stamps if stamp.get(name)) for name in names}
    return ", ".join(f"{name} {' and '.join(found)}" for name, found in values.items() if found)


def section(command: str, some: list[dict[str, dict]], full: bool) -> str:
    """The tables of one command on one machine."""
    if command == "step":
        return "\n\n".join(f"{title(first(group)['case'])}\n\n{curves_table(group)}" for group in some)
    if command == "kernels":
        return "\n\n".join(f"{title(first(group)['case'])}\n\n{kernels_table(group)}" for group in some)
    parts = [summary(some)]
    if full:
        for group in some:
            case = first(group)["case"]
            tokens = case["batch"] * case["sequence"] if command == "model" else 0
            parts.append(f"{title(case)}\n\n{group_table(group, tokens)}")
    return "\n\n".join(parts)


def summary(some: list[dict[str, dict]]) -> str:
    """One row per case: ours, in the form that is chosen unasked, against everybody; ratios above 1 are losses."""
    rows = []
    for group in some:
        name, ours = our_row(group)
        slowest_dora, fastest_dora = (pick(peers(group), default=None) for pick in (max, min))
        base, lora = base_seconds(group), lora_seconds(group)
        rows.append(
            (
                title(first(group)["case"]),
                name,
                f"{ours * 1e3:.2f}{' (noise)' if is_noise(group.get(name)) else ''}" if ours else "-",
                ratio(ours, base),
                ratio(ours, lora),
                ratio(ours, fastest_dora),
                ratio(ours, slowest_dora),
                ratio(lora, base),
            )
        )
    header = (
        "case",
        "ours",
        "ms",
        "× base",
        "× LoRA",
        "× others' DoRA, best",
        "× others' DoRA, worst",
        "LoRA × base",
    )
    return table(header, rows)


def our_row(group: dict[str, dict]) -> tuple[str, float | None]:
    """Which row is ours, and its time. Older files have no row of `OURS`: the fastest form then, by its name."""
    for name in OURS:
        if name in group:
            time = seconds(group[name])
            return (name if time else f"{name}: failed"), time
    times = {name: t for name, row in group.items() if name.startswith("ours") and (t := seconds(row))}
    fastest = min(times, key=times.get, default="every form failed")
    return fastest, times.get(fastest)


def peers(group: dict[str, dict]) -> list[float]:
    """The times of other libraries' DoRA, as they are."""
    prefixes = ("PEFT DoRA", "Axolotl DoRA")
    found = (row for name, row in group.items() if name.startswith(prefixes) and "patched" not in name)
    return [t for row in found if (t := seconds(row))]


def draw(found: list[dict[str, dict]], folder: Path) -> Iterable[Path]:
    """One image per machine and command that has something to draw."""
    for number, machine in enumerate(dict.fromkeys(map(machine_of, found))):
        here = [group for group in found if machine_of(group) == machine]
        of = {command: [g for g in here if first(g)["command"] == command] for command in COMMANDS}
        name = f"{first(here[0])['stamp']['kind'].lower()}-{number}"
        for x in ("tokens", "rank"):
            yield from plot_layers(of["layer"], x, machine, folder / f"{name}-layer-{x}.png")
        yield from plot_roofline(of["kernels"], machine, folder / f"{name}-roofline.png")
        yield from plot_memory(of["model"], machine, folder / f"{name}-memory.png")
        yield from plot_losses(of["step"], machine, folder / f"{name}-losses.png")
