"""The table of one case: every contestant's times and memory, and their ratio to the frozen base and to PEFT's LoRA."""

from collections.abc import Callable

from ..measuring.profiler import profiled_seconds
from .tables import mebibytes, milliseconds, ratio, table

HEADER = ("contestant", "forward ms", "backward ms", "total ms", "± %", "min ms", "peak MiB")
NOISE = 10.0  # percent
FUSED_GLU = "frozen base, fused GLU"
"""A contestant: silu(gate) ⊙ up is one pass each way."""


def seconds(row: dict | None, part: str = "total") -> float | None:
    """The median time of one part, or None where there is none."""
    return row["seconds"][part]["median"] if row and row.get("seconds", {}).get(part) else None


def spread_of(row: dict | None) -> float | None:
    """Half the distance between the quartiles, in percent of the median; None where it was not measured."""
    total = seconds(row)
    times = row["seconds"]["total"] if total else {}
    return 50 * (times["high"] - times["low"]) / total if "high" in times else None


def is_noise(row: dict | None) -> bool:
    """Whether a time spreads by more than `NOISE`, so that its ratios say little."""
    return (spread_of(row) or 0) > NOISE


def base_seconds(group: dict[str, dict], part: str = "total") -> float | None:
    """The frozen base's time, as its own library computes it."""
    names = (name for name in group if name.startswith("frozen base") and name != FUSED_GLU)
    return min((t for name in names if (t := seconds(group[name], part))), default=None)


def lora_seconds(group: dict[str, dict], part: str = "total") -> float | None:
    """The time of the fastest PEFT LoRA in the group: a ratio to a slower one would flatter."""
    return min(
        (t for name, row in group.items() if name.startswith("PEFT LoRA") and (t := seconds(row, part))), default=None
    )


def group_table(group: dict[str, dict], tokens: int = 0, mark: str = "") -> str:
    """`group` holds a result by contestant, as `records` stores them. Below it stands why a contestant failed.

    One that is predicted to fail for its memory has a peak and no time.
    With `tokens` per call there is a column of tokens a second; where kernels were profiled, one of their sum; where it
    was counted, what a decoder layer launches; where it is known, what is saved for the backward. `mark` stands behind
    the names of the ratios.
    """
    references = {"× base": base_seconds(group), "× LoRA": lora_seconds(group)}
    if FUSED_GLU in group:
        references["× base, fused GLU"] = seconds(group[FUSED_GLU])
    extra = _extra_columns(group, tokens)
    rows, notes = [], []
    for name, row in group.items():
        total = seconds(row)
        if total is None:
            cells = ["FAILED", *["-"] * 4, mebibytes(row.get("peak_bytes")), *["-"] * len(references)]
            notes.append(f"{name} failed: {row.get('failed')}")
        else:
            times = row["seconds"]["total"]
            cells = [
                *(milliseconds(seconds(row, part)) for part in ("forward", "backward")),
                milliseconds(total),
                f"{spread:.0f}{' noise' if is_noise(row) else ''}" if (spread := spread_of(row)) is not None else "-",
                milliseconds(times.get("minimum")),
                mebibytes(row.get("peak_bytes")),
                *(ratio(total, reference) for reference in references.values()),
            ]
        rows.append((name, *cells, *(cell(row) for cell in extra.values())))
    header = (*HEADER, *(name + mark for name in references), *extra)
    return "\n".join([table(header, rows), *notes])


def _extra_columns(group: dict[str, dict], tokens: int) -> dict[str, Callable[[dict], str]]:
    """The columns that not every group has: by name, a row's cell."""
    columns = {}
    if tokens:
        columns["tokens/s"] = lambda row: f"{tokens / total:.0f}" if (total := seconds(row)) else "-"
    if any(row.get("profile") for row in group.values()):
        columns["kernels ms"] = lambda row: milliseconds(profiled_seconds(row))
    if any(row.get("saved_bytes") for row in group.values()):
        columns["saved MiB"] = lambda row: mebibytes(row.get("saved_bytes"))
    if any(row.get("block") for row in group.values()):
        columns["launches"] = lambda row: _launches(row.get("block"))
    if any(row.get("layer") for row in group.values()):
        columns["launches a layer"] = lambda row: _launches(row.get("layer"))
        columns["saved MiB a layer"] = lambda row: mebibytes((row.get("layer") or {}).get("saved_bytes"))
    return columns


def _launches(layer: dict | None) -> str:
    """Forward + backward."""
    return "+".join(map(str, layer["launches"].values())) if layer else "-"


def title(case: dict) -> str:
    """The case on one line."""
    return ", ".join(f"{name} {value}" for name, value in case.items() if value not in ("", False, None))
