"""`tests/SCORECARD.md`: one line per row. A row that was not measured keeps the line that stands there."""

from pathlib import Path

from .row import NAMES, Row, Verdict, module

PATH = Path(__file__).parents[1] / "SCORECARD.md"
HEAD = """# The reliability scorecard

`make scorecard` measures every row, prints this table and writes it here; `python -m tests.scorecard NAME` one of them,
`--fast` those that CI measures. Each line says at which commit it was measured.

| # | row | figure | target | measured | met | commit | date |
|---|---|---|---|---|---|---|---|
"""


def line(name: str, row: Row, verdict: Verdict, stamp: dict) -> str:
    met = "yes" if verdict.met else "**no**"
    cells = (NAMES.index(name) + 1, name, row.what, row.target, verdict.measured, met, stamp["commit"], stamp["date"])
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def write(lines: dict[str, str]) -> None:
    """Replaces the lines of these rows; one that never ran says so."""
    kept = _read() | lines
    unmeasured = (
        f"| {number} | {name} | {module(name).ROW.what} | {module(name).ROW.target} | not run | **no** | – | – |"
        for number, name in enumerate(NAMES, 1)
        if name not in kept
    )
    kept |= {text.split(" | ")[1]: text for text in unmeasured}
    PATH.write_text(HEAD + "".join(kept[name] + "\n" for name in NAMES))


def _read() -> dict[str, str]:
    if not PATH.exists():
        return {}
    rows = [text for text in PATH.read_text().splitlines() if text.startswith("| ") and text[2].isdigit()]
    return {text.split(" | ")[1]: text for text in rows}
