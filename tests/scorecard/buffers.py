"""The kernel tests with each launch between guard bands, over memory full of NaN; and that no kernel is left out."""

import ast
from collections import Counter
from pathlib import Path

from .row import Row, Verdict, failures

KERNELS = Path(__file__).parents[2] / "dora_kernels" / "ops" / "kernels"
# The files whose tests are of kernels, alone or as a layer.
STEMS = ("kernels", "stacked", "rounding", "nf4", "reference", "autograd", "layouts", "dropout", "autocast")
FILES = (*(f"ops/test_{stem}" for stem in STEMS), "models/test_qdora", "models/test_qdora_merge")


def kernels():
    """The names of all kernels, read from the source."""
    functions = (node for path in KERNELS.glob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    names = {node.name for node in functions if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.endswith("_kernel")}


def run(case):
    from .suite import outcomes_and_counts

    outcomes, counts = outcomes_and_counts(f"tests/{case}.py", "-p", "tests.scorecard.guarded", "-m", "not gpu")
    # What only a GPU can run is not selected: nothing else may be left out.
    failed = [test for test, outcome in outcomes.items() if outcome != "passed"]
    assert not failed, f"{len(failed)} of {len(outcomes)} tests, {failed[0]} first: {outcomes[failed[0]]}"
    return {"passed": len(outcomes), "launches": {name: counts[name] for name in kernels() & counts.keys()}}


def judge(records):
    if failed := failures(records):
        return Verdict("; ".join(f"{record['case']}: {record['failed']}" for record in failed), False)
    launches = Counter()
    for record in records:
        launches.update(record["launches"])
    passed, missing = sum(record["passed"] for record in records), kernels() - launches.keys()
    measured = f"{passed:,} tests, {launches.total():,} launches of {len(launches)} of {len(kernels())} kernels"
    if missing:
        measured += f", without {', '.join(sorted(missing))}"
    return Verdict(measured + ", 0 failures", not missing)


ROW = Row(
    what="kernel tests with NaN-poisoned outputs, and guard bands around every buffer of every launch",
    target="all kernels, 0 failures",
    cases=lambda: FILES,
    run=run,
    judge=judge,
)
