"""A row of the scorecard: its cases, how one is measured, and what all of them together say."""

import importlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

Record = dict
"""What a case left: "case", "failed" (a message, or None), "seconds", and figures of the row's own."""

# In the order of the table; each is a module here.
NAMES = (
    "properties",
    "errors",
    "gradients",
    "layouts",
    "buffers",
    "shim",
    "mutations",
    "peft_suite",
    "failure_modes",
    "kills",
    "stops",
    "write_faults",
    "command_lines",
    "adapters",
    "paths",
    "processes",
    "convergence",
    "determinism",
    "order",
    "families",
    "slow",
)


@dataclass(frozen=True)
class Verdict:
    """What the table says of a row: the figure as text, and whether it meets its target."""

    measured: str
    met: bool


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        what: the figure. target: its bar, in words.
        cases: their ids, in order; the same at each call.
        run: measures the case of that id and returns its figures; any exception is the failure of that case.
        judge: from the records of all cases, in order.
        fast: seconds, so that CI measures it too.
    """

    what: str
    target: str
    cases: Callable[[], Iterable[str]]
    run: Callable[[str], dict]
    judge: Callable[[list[Record]], Verdict]
    fast: bool = False


def module(name: str) -> ModuleType:
    return importlib.import_module(f"tests.scorecard.{name}")


def failures(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record["failed"] is not None]


def none_fail(at_least: int, of: str = "cases") -> Callable[[list[Record]], Verdict]:
    """The judge of rows that count: that many cases, and no failure among them."""

    def judge(records: list[Record]) -> Verdict:
        failed = len(failures(records))
        return Verdict(f"{len(records):,} {of}, {failed} failures", len(records) >= at_least and not failed)

    return judge


def measure(name: str, row: Row, path: Path, stamp: dict, head: Callable[[], str]) -> list[Record]:
    """The records of all cases; those that `path` holds from the same commit and software are not measured again.

    Each case is on disk before the next one starts, so that a row which was interrupted goes on where it was. Rows run
    for hours, and some start processes that read the tree as it then is: after each case `head` must still tell the
    stamp's commit. Raises SystemExit where it does not; what was measured before that stays.
    """
    kept = {record["case"]: record for record in _read(path, stamp)}
    path.parent.mkdir(parents=True, exist_ok=True)
    rewritten = path.with_suffix(".new")  # a kill in the midst of it must not cost hours
    rewritten.write_text("".join(json.dumps(line) + "\n" for line in (stamp, *kept.values())))
    os.replace(rewritten, path)
    cases = list(row.cases())
    with path.open("a") as file:
        for case in tqdm(cases, desc=name, unit="case"):
            if case in kept:
                continue
            started = time.perf_counter()
            record = {"case": case, "failed": None}
            try:
                record |= row.run(case)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # pytest's own failures, and commands that exit, are failures of this case
                record["failed"] = f"{type(error).__name__}: {error}"
            record["seconds"] = round(time.perf_counter() - started, 3)
            if (commit := head()) != stamp["commit"]:
                raise SystemExit(f"{name}: the tree was {stamp['commit']} and is {commit} now; measure it again")
            file.write(json.dumps(record) + "\n")
            file.flush()
            kept[case] = record
    return [kept[case] for case in cases]


def _read(path: Path, stamp: dict) -> list[Record]:
    """The records of a file with this stamp; a last line that a kill cut short is left out.

    A tree with changes has no commit that would tell one measurement from the next: nothing of it is kept.
    """
    if not path.exists() or stamp["commit"].endswith(("-changed", "unknown")):
        return []
    first, *lines = path.read_text().split("\n")[:-1] or ["null"]
    same = _but_for_the_date(json.loads(first)) == _but_for_the_date(stamp)
    return [json.loads(line) for line in lines] if same else []


def _but_for_the_date(stamp: dict | None) -> dict:
    # A row of hours runs past midnight.
    return {name: value for name, value in (stamp or {}).items() if name != "date"}
