"""Row 9: the twenty-nine failure modes that befell others, and the tests of our suite that hold each.

A case is a mode by its number. It holds when every test it names ran and passed; what only a GPU can show is named
beside it, and until one ran that the mode reads "not run". All tests run together, in one process, once.
"""

import functools
import subprocess
from pathlib import Path
from typing import NamedTuple

from .row import Record, Row, Verdict, failures
from .suite import NOT_RUN, outcomes

COUNT = 29
TABLE = Path(__file__).with_name("failure_modes.yaml")


class Mode(NamedTuple):
    """`tests` and, of compiled kernels, `gpu`: as `file::function`, each with all of its parameters, or `[those]`."""

    what: str
    tests: list[str]
    gpu: list[str] | tuple[()] = ()


@functools.cache
def modes() -> dict[int, Mode]:
    import yaml

    return {number: Mode(**fields) for number, fields in yaml.safe_load(TABLE.read_text()).items()}


def path(test: str) -> str:
    """As pytest takes it."""
    file, _, function = test.partition("::")
    return f"tests/{file}.py::{function}"


def named(test: str, found: dict[str, str]) -> dict[str, str]:
    """The outcomes of a test: of all its parameters, but for those that only a GPU can run."""
    file, _, function = test.partition("::")
    id = f"tests.{file.replace('/', '.')}::{function}"
    return {
        name: outcome
        for name, outcome in found.items()
        if (name == id or name.startswith(f"{id}[")) and not (outcome == "skipped" and "cuda" in name)
    }


def holds(test: str, found: dict[str, str]) -> bool:
    """Whether the test ran and passed."""
    return set(named(test, found).values()) == {"passed"}


@functools.cache
def ran(*words: str) -> dict[str, str] | Exception:
    """The outcomes, or why there are none: a hang must not be waited for once a mode."""
    try:
        return outcomes(*words)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return error


def of_all(*words: str) -> dict[str, str]:
    if isinstance(found := ran(*words), Exception):
        raise found
    return found


def on_a_cpu() -> dict[str, str]:
    return of_all(*dict.fromkeys(path(test) for mode in modes().values() for test in mode.tests))


def on_a_gpu() -> dict[str, str]:
    """Nothing where there is none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return of_all("-m", "gpu", *dict.fromkeys(path(test) for mode in modes().values() for test in mode.gpu))


def run(case: str) -> dict:
    mode = modes()[int(case)]
    if broken := [test for test in mode.tests if not holds(test, on_a_cpu())]:
        raise AssertionError(f"{mode.what}: {broken[0]}: {named(broken[0], on_a_cpu()) or 'did not run'}")
    if not on_a_gpu():
        return {"tests": len(mode.tests), "gpu": NOT_RUN if mode.gpu else None}
    if broken := [test for test in mode.gpu if not holds(test, on_a_gpu())]:
        raise AssertionError(f"{mode.what}, on a GPU: {broken[0]}: {named(broken[0], on_a_gpu()) or 'did not run'}")
    return {"tests": len(mode.tests), "gpu": "passed" if mode.gpu else None}


def judge(records: list[Record]) -> Verdict:
    failed = [record["case"] for record in failures(records)]
    waiting = [record["case"] for record in records if record["failed"] is None and record["gpu"] == NOT_RUN]
    held = len(records) - len(failed) - len(waiting)
    parts = [f"{held} of {COUNT}"]
    if waiting:
        parts.append(f"{len(waiting)} more hold on a CPU and are {NOT_RUN}: {', '.join(waiting)}")
    if failed:
        parts.append(f"broken: {', '.join(failed)}")
    return Verdict("; ".join(parts), held == COUNT)


ROW = Row(
    what="failure modes that befell others, a named test each",
    target=f'{COUNT} of {COUNT}; those that need a GPU read "not run" until one ran them',
    cases=lambda: map(str, range(1, COUNT + 1)),
    run=run,
    judge=judge,
)
