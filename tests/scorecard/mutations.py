"""Row 7: engines that are wrong on purpose, and whether our suite turns red.

A case is one mutant of `mutants.yaml`, applied to a copy of the tracked files. The tests it names run first, then those
of the whole engine (`wider`), or for a mutant of training those of training. Benchmarks and demo are left out. It is
killed by a test that fails; one that cannot be imported is no mutant. In the case `unchanged` none of either may.
"""

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .row import Record, Row, Verdict
from .suite import ROOT, outcomes

MUTANTS = Path(__file__).with_name("mutants.yaml")
UNCHANGED = "unchanged"
ENGINE = ("ops", "layers", "models", "peft", "adapters")
TRAINING = ("training",)
LEFT_OUT = ("test_gpu", "test_gpu_paths", "test_callback", "test_peft_suite", "test_packaging")  # the last asks git
SECONDS = 1800


@dataclass(frozen=True)
class Mutant:
    """In `file`, `old` becomes `new`; `tests` are the most likely to see it: `file`, or `file::function`."""

    id: str
    kind: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def in_a_kernel(self) -> bool:
        return self.file.startswith("dora_kernels/ops/kernels/")

    def applied(self, root: Path) -> str:
        """The file's text with the fault in it. Raises ValueError where `old` is not there exactly once."""
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.id}: {self.file} has {text.count(self.old)} times {self.old!r}, not once")
        return text.replace(self.old, self.new)

    def named(self) -> list[str]:
        """The tests as pytest takes them."""
        names = (name.partition("::") for name in self.tests.split())
        return [f"tests/{file}.py{separator}{function}" for file, separator, function in names]


@functools.cache
def mutants() -> dict[str, Mutant]:
    import yaml

    return {fields["id"]: Mutant(**fields) for fields in yaml.safe_load(MUTANTS.read_text())}


def wider(root: Path, folders: tuple[str, ...] = ENGINE) -> list[str]:
    """The test files of the engine, or of other folders."""
    tests = root / "tests"
    files = [*tests.glob("test_*.py"), *(file for folder in folders for file in (tests / folder).glob("test_*.py"))]
    return sorted(str(file.relative_to(root)) for file in files if file.stem not in LEFT_OUT)


@contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, tracked.split("\0")):
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        yield Path(folder)


def failing(files: list[str], root: Path) -> str | None:
    """The first test of these files that fails, or None; a file that does not load raises."""
    found = outcomes("-x", *files, root=root, timeout=SECONDS)
    if broken := [test for test, outcome in found.items() if outcome == "not loaded"]:
        raise RuntimeError(f"no mutant: {broken[0]} does not load")
    return next((test for test, outcome in found.items() if outcome == "failed"), None)


def run(case: str) -> dict:
    with copy_of_the_tree() as root:
        if case == UNCHANGED:
            every = dict.fromkeys(name for mutant in mutants().values() for name in mutant.named())
            if test := failing(list(every), root) or failing(wider(root), root):
                raise AssertionError(f"{test} fails in the unchanged tree")
            return {}
        mutant = mutants()[case]
        (root / mutant.file).write_text(mutant.applied(root))
        named = mutant.named()
        others = wider(root, TRAINING if mutant.kind == "training" else ENGINE)
        killer = failing(named, root) or failing([file for file in others if file not in named], root)
    assert killer is not None, "survives"
    return {"killed_by": killer}


def judge(records: list[Record]) -> Verdict:
    control, *records = records
    killed = {record["case"] for record in records if record["failed"] is None}
    every = [mutants()[record["case"]] for record in records]
    gradients = [mutant for mutant in every if mutant.kind == "gradient"]
    kernels = [mutant for mutant in every if mutant.in_a_kernel]
    dead, dead_gradients, dead_kernels = (
        sum(mutant.id in killed for mutant in those) for those in (every, gradients, kernels)
    )
    enough = len(every) >= 40 and len(gradients) >= 12 and len(kernels) >= 8
    return Verdict(
        f"{dead} of {len(every)} killed ({100 * dead / len(every):.0f} %); gradients {dead_gradients} of "
        f"{len(gradients)}, in kernels {dead_kernels} of {len(kernels)}; the unchanged tree "
        + ("passes" if control["failed"] is None else "fails"),
        enough and dead >= 0.95 * len(every) and dead_gradients == len(gradients) and control["failed"] is None,
    )


ROW = Row(
    what="mutation score of our suite: wrong engines killed by a failing test",
    target="≥ 40 mutants (≥ 12 wrong gradients, ≥ 8 inside kernels), ≥ 95 % killed, gradients 100 %",
    cases=lambda: (UNCHANGED, *mutants()),
    run=run,
    judge=judge,
)
