"""The day's report, from its files alone: the README's table first, then what stands behind it, and what went wrong."""

from .. import block, experts, kernels, layer, model, questions, roofs
from ..counting.gpus import by_bytes_and_flops
from ..counting.predicted import Limit
from ..measuring import clocks
from ..measuring.shapes import Run, model_flops
from ..report import machine_of, section, software
from ..rows.compare import seconds, title
from ..rows.records import groups, read_rows
from ..rows.tables import ratio, table
from . import gpu_tests, predicted
from .folder import REPORT, RESULTS, THRESHOLDS, Folder

PUBLISHED = {
    "who": "NeMo AutoModel's LoRA, published 2026-06-12",
    "gpu": "1 × H100 80 GB",
    "batch": "2 × 4096",
    "accumulation": 16,
    "kernels": "Transformer Engine, Triton LoRA; r = 16, dropout 0.1",
    "seconds": 10.51,
    "model_tflops": 402,
    "tokens_per_second": 12473,
}
"""A fused LoRA trainer's figures for the same model, rank, projections and micro-batch, as its authors give them."""

CONDITIONS = """, all projections; random weights, random tokens, no dropout, AdamW. A step is forward, backward and
optimizer. Model FLOPs are the frozen base's, forward and backward to the inputs, without what is recomputed. ± is half
the distance between the quartiles. Peak is the allocator's, frozen weights included. Command: `python -m bench day`.
"""


def write(folder: Folder, limit: Limit = by_bytes_and_flops) -> None:
    """Writes the report of what the folder holds now; `limit` says what a launch's time is predicted from."""
    path = folder.path / RESULTS
    found = groups(read_rows([path])) if path.exists() else []
    folder.write(REPORT, "\n\n".join(parts(folder, found, limit)) + "\n")


def parts(folder: Folder, found: list[dict[str, dict]], limit: Limit) -> list[str]:
    """The report, part by part."""
    of = {}
    for group in found:
        of.setdefault(first(group)["command"], []).append(group)
    text = ["# A day on a GPU" + (": rehearsed, no number means anything" if _rehearsed(found) else "")]
    if found:
        text += [f"{machine_of(found[0])}; {software(found)}", f"Before and after: {conditions(found)}"]
    text += ["## Headline", headline(of.get(model.COMMAND, []))]
    text += ["## Steps", progress(folder)]
    for command in (model.COMMAND, experts.COMMAND, block.COMMAND, layer.COMMAND, kernels.COMMAND):
        if command in of:
            text += [f"## {command}", section(command, of[command], full=True)]
    for group in of.get(roofs.COMMAND, []):
        text += ["## Roofs", roofs.roofs_table(group) if roofs.COPY in group else str(first(group).get("failed"))]
    text += ["## Predicted beside measured", _predicted(found, folder, limit)]
    if questions.COMMAND in of:
        asked = (f"{title(first(group)['case'])}\n\n{questions.answers(group)}" for group in of[questions.COMMAND])
        text += ["## Questions", *asked]
    if (folder.path / THRESHOLDS).exists():
        text += ["## Proposed constants", f"```json\n{(folder.path / THRESHOLDS).read_text()}```"]
    text += ["## Tests", tests(folder), "## What is not to be believed, and what failed", doubts(found)]
    return text


def first(group: dict[str, dict]) -> dict:
    return next(iter(group.values()))


def _rehearsed(found: list[dict[str, dict]]) -> bool:
    return bool(found) and "rehearsed" in first(found[0])["stamp"]["device"]


def conditions(found: list[dict[str, dict]]) -> str:
    """Clocks and power before the first case and after the last."""
    read = [row["clocks"] for group in found for row in group.values() if row.get("clocks")]
    return f"{clocks.shown(read[0][0])}; {clocks.shown(read[-1][1])}" if read else "clocks were not read"


def headline(found: list[dict[str, dict]]) -> str:
    """The field's table: one row per contestant of each step of a whole model, the published row last."""
    rows = [headline_row(name, row) for group in found for name, row in group.items()]
    p = PUBLISHED
    who, batch, rates = f"{p['who']} ({p['kernels']})", p["batch"], (p["model_tflops"], p["tokens_per_second"])
    rows.append((who, p["gpu"], batch, str(p["accumulation"]), f"{p['seconds']}", *map(str, rates), "1.00", "-", "-"))
    header = ("kernels", "GPU", "micro-batch × sequence", "accumulation", "s/step", "model TFLOP/s", "tokens/s/GPU")
    measured = " and ".join(dict.fromkeys(first(group)["case"]["model"] for group in found)) or "nothing yet"
    return f"{table((*header, '× published', 'peak GiB', 'commit'), rows)}\n\nMeasured: {measured}{CONDITIONS}"


def headline_row(name: str, row: dict) -> tuple[str, ...]:
    """One contestant's step."""
    run = Run(**{field: row["case"][field] for field in Run._fields})
    time, tokens = seconds(row), run.batch * run.sequence
    rates = ("-", "-", "-")
    if time:
        total = row["seconds"]["total"]
        spread = 50 * (total["high"] - total["low"]) / time
        rates = (
            f"{model_flops(run) / time / 1e12:.0f}",
            f"{tokens / time:.0f}",
            ratio(tokens / time, PUBLISHED["tokens_per_second"]),
        )
    held = (row.get("peak_bytes"), row.get("frozen_bytes"))
    return (
        f"{name}{', checkpointed' if run.checkpointing else ''}, r = {run.rank}",
        row["stamp"]["device"],
        f"{run.batch} × {run.sequence}",
        "1",
        f"{time:.3f} ± {spread:.0f} %" if time else f"failed: {row.get('failed')}",
        *rates,
        "-" if None in held else f"{sum(held) / 2**30:.1f}",
        row["stamp"]["commit"],
    )


def progress(folder: Folder) -> str:
    """One row per step."""
    rows = [
        (name, k["cost"], f"{k['seconds']:.0f}", str(k["cases"]), str(k["left"] or 0), str(k["failed"]))
        for name, k in folder.state["steps"].items()
    ]
    lines = [table(("step", "said before", "seconds", "cases", "left", "failed"), rows)]
    for died in folder.state["deaths"]:
        lines.append(f"A process died in {died['step']}: {title(died['case'])}")
    return "\n\n".join(lines)


def _predicted(found: list[dict[str, dict]], folder: Folder, limit: Limit) -> str:
    gpu = predicted.gpu_of(folder.state["device"] or "", tuple(folder.state["capability"] or ()))
    roofs_found = predicted.roofs_of(found, gpu)
    return predicted.section(list(predicted.compare(found, roofs_found, limit)), roofs_found, limit)


def tests(folder: Folder) -> str:
    """One row per file of tests, and the name of each test that failed."""
    suites = gpu_tests.read(folder)
    rows = [
        (file, gpu_tests.FILES.get(file, ""), *(str(n) for n in gpu_tests.count(suite).values()))
        for file, suite in suites.items()
    ]
    failed = [
        f"- {gpu_tests.name_of(case)}"
        for suite in suites.values()
        for case in suite.iter("testcase")
        if gpu_tests.outcome(case) == "failed"
    ]
    return "\n".join([table(("file", "protects", "passed", "failed", "skipped"), rows), "", *failed])


def doubts(found: list[dict[str, dict]]) -> str:
    """Rows that claim more than memory has, and rows that failed."""
    lines = []
    for group in found:
        where = f"{first(group)['command']}, {title(first(group)['case'])}"
        operations = first(group)["command"] == kernels.COMMAND
        for name, row in group.items():
            if row.get("failed"):
                lines.append(f"- {where}: {name}: {row['failed']}")
            elif operations and name != kernels.COPY and kernels.implausible(row, group):
                lines.append(f"- {where}: {name}: more bytes a second than {kernels.PLAUSIBLE} × the measured copy")
    return "\n".join(lines) or "Nothing."
