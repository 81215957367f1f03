"""The table of one case: every contestant's times and memory, and their ratio to the frozen base and to PEFT's LoRA."""

from ..measuring.profiler import profiled_seconds
from .tables import mebibytes, milliseconds, ratio, table

HEADER = ("contestant", "forward ms", "backward ms", "total ms", "± %", "min ms", "peak MiB", "× base", "× LoRA")


def seconds(row: dict | None, part: str = "total") -> float | None:
    """The median time of one part, or None where there is none."""
    return row["seconds"][part]["median"] if row and row.get("seconds", {}).get(part) else None


def base_seconds(group: dict[str, dict], part: str = "total") -> float | None:
    """The frozen base's time."""
    return min(
        (t for name, row in group.items() if name.startswith("frozen base") and (t := seconds(row, part))), default=None
    )


def lora_seconds(group: dict[str, dict], part: str = "total") -> float | None:
    """The time of the fastest PEFT LoRA in the group: a ratio to a slower one would flatter."""
    return min(
        (t for name, row in group.items() if name.startswith("PEFT LoRA") and (t := seconds(row, part))), default=None
    )


RATIOS = ("× base", "× LoRA")


def group_table(group: dict[str, dict], tokens: int = 0, mark: str = "") -> str:
    """`group` holds a result by contestant, as `records` stores them. Below it stands why a contestant failed.

    One that is predicted to fail for its memory has a peak and no time.
    With `tokens` per call there is a column of tokens a second; where kernels were profiled, one of their sum. `mark`
    stands behind the names of the ratios.
    """
    base, lora = base_seconds(group), lora_seconds(group)
    profiled = any(row.get("profile") for row in group.values())
    named = [name + mark if name in RATIOS else name for name in HEADER]
    header = (*named, *["tokens/s"] * bool(tokens), *["kernels ms"] * profiled)
    rows, notes = [], []
    for name, row in group.items():
        total = seconds(row)
        if total is None:
            cells = ["FAILED", *["-"] * 4, mebibytes(row.get("peak_bytes")), "-", "-"]
            notes.append(f"{name} failed: {row.get('failed')}")
        else:
            times = row["seconds"]["total"]
            cells = [
                *(milliseconds(seconds(row, part)) for part in ("forward", "backward")),
                milliseconds(total),
                f"{50 * (times['high'] - times['low']) / total:.0f}" if "high" in times else "-",
                milliseconds(times.get("minimum")),
                mebibytes(row.get("peak_bytes")),
                ratio(total, base),
                ratio(total, lora),
            ]
        if tokens:
            cells.append(f"{tokens / total:.0f}" if total else "-")
        if profiled:
            cells.append(milliseconds(profiled_seconds(row)))
        rows.append((name, *cells))
    return "\n".join([table(header, rows), *notes])


def title(case: dict) -> str:
    """The case on one line."""
    return ", ".join(f"{name} {value}" for name, value in case.items() if value not in ("", False, None))
