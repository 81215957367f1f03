"""The judges of rows that a good record meets: a bad one, or one too few, must not."""

import re
import signal
from collections import Counter
from unittest import mock

import pytest
import torch

from tests.support.oracle import make_problem, solve
from tests.test_architecture import FORBIDDEN

from . import (
    convergence,
    determinism,
    errors,
    failure_modes,
    families,
    kills,
    order,
    peft_suite,
    processes,
    shim,
    stops,
)


def records(row, **figures):
    return [{"case": case, "failed": None} | figures for case in row.ROW.cases()]


GOOD = {
    peft_suite: {"plain": 727, "passed": 727},
    kills: {"points": 25, "in a save": 12, "most steps lost": 2},
    stops: {"points": 25},
    processes: {"tests": 4},
    convergence: {"difference": 1e-7},
    determinism: {},
    order: {"passed": 2000},
    families: {"unreadable": False},
}


def good(row):
    """As `GOOD` has it; the control of convergence is wrong, and the case of a GPU tells of itself."""
    found = records(row, **GOOD[row])
    for record in found:
        if record["case"].endswith(" wrong"):
            record["difference"] = 1e-2
        if record["case"] == "gpu":
            record["gpu"] = determinism.NOT_RUN
    return found


@pytest.mark.parametrize("row", GOOD, ids=lambda row: row.__name__.rpartition(".")[2])
def test_all_cases_and_no_failure(row):
    assert row.judge(good(row)).met
    assert not row.judge(good(row)[1:]).met, "one too few"
    for number in range(len(good(row))):
        broken = good(row)
        broken[number] = {"case": broken[number]["case"], "failed": "AssertionError"}
        assert not row.judge(broken).met, broken[number]["case"]


BAD = [
    (peft_suite, {"passed": 726}),
    (peft_suite, {"plain": 726, "passed": 726}),  # a suite that did not run whole
    (kills, {"points": 24}),
    (stops, {"points": 24}),
    (convergence, {"difference": 1.1e-5}),
    (convergence, {"difference": float("nan")}),
    (order, {"passed": 1999}),  # a test that vanished
]


@pytest.mark.parametrize(("row", "figures"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_one_bad_figure(row, figures):
    # Not the first: max() and min() keep a NaN that comes first.
    changed = good(row)
    changed[1] |= figures
    assert not row.judge(changed).met


def test_a_test_of_two_processes_that_vanished():
    changed = good(order)
    changed[-1] |= {"passed": 1999}
    assert not order.judge(changed).met


def test_families_that_could_not_be_built_are_not_counted():
    found = records(families, not_built="ValueError")
    for record in found[: families.LEAST - 1]:
        record |= {"unreadable": False}
        del record["not_built"]
    verdict = families.judge(found)
    assert not verdict.met and f"{len(found) - families.LEAST + 1} more cannot be built" in verdict.measured


def test_the_load_ends_with_its_scope():
    with order.load() as busy:
        assert len(busy) > 0 and not any(process.poll() for process in busy)
    assert all(process.returncode == -signal.SIGKILL for process in busy)


def test_kills_that_all_come_between_the_saves():
    assert not kills.judge(records(kills, **GOOD[kills] | {"in a save": 2})).met


def test_the_counts_of_kills_are_read():
    line = "SIGKILL points: 25, in a save: 13, most steps lost: 2 31 s"
    assert kills.counts_in(line) == {"points": 25, "in a save": 13, "most steps lost": 2}


def test_a_wrong_engine_that_is_not_seen():
    found = good(convergence)
    next(record for record in found if record["case"].endswith(" wrong"))["difference"] = 0.0
    assert not convergence.judge(found).met


def test_training_that_ends_in_nan_is_no_agreement(monkeypatch):
    curve = [1.0] * 16 + [0.5] * 16
    monkeypatch.setattr(convergence, "peft_model", lambda family: family)
    monkeypatch.setattr(convergence, "losses", lambda model: curve)
    monkeypatch.setattr(convergence, "trained", lambda family, engine: [*curve[:-1], float("nan")])
    with pytest.raises(AssertionError, match="not finite"):
        convergence.run("llama kernels")


def test_a_file_that_lost_its_tests(monkeypatch):
    monkeypatch.setattr("tests.scorecard.suite.outcomes", lambda *words: {"test": "passed"})
    with pytest.raises(AssertionError, match="1 tests only"):
        processes.run("layers/test_offload")


def test_a_hang_is_waited_for_once(monkeypatch):
    asked = Counter()

    def outcomes(*words):
        asked["times"] += 1
        raise RuntimeError("it hangs")

    monkeypatch.setattr(failure_modes, "outcomes", outcomes)
    failure_modes.ran.cache_clear()
    try:
        for number in ("1", "2"):
            with pytest.raises(RuntimeError, match="it hangs"):
                failure_modes.run(number)
    finally:
        failure_modes.ran.cache_clear()
    assert asked["times"] == 1


def test_a_check_of_the_shim_that_compares_nothing():
    with mock.patch("tests.support.test_interpreter.test_dot"), pytest.raises(AssertionError, match="compares nothing"):
        shim.run("dot")


@pytest.mark.parametrize("code", ["tl.atomic_add(p, x)", "y.index_add_(0, i, x)", "torch.scatter_reduce(x, 0, i, y)"])
def test_the_source_is_searched_for_what_sums_by_atomics(code):
    assert re.search(FORBIDDEN["float atomics"], code)


@pytest.mark.parametrize("mix", ["bf16", "bf16-fp32-adapters"])
@pytest.mark.parametrize("name", ["y", "dx", "dm"])
def test_errors_are_judged_in_every_mix(mix, name):
    values = dict.fromkeys(("y", "dx", "dA", "dB", "dm"), 1.0)
    ours = {f"token {rounding}": values for rounding in ("nearest", "dithered")} | {"token floor": {"y": 1.0}}
    squares = {"peft": dict.fromkeys(values, 2.0)} | ours
    record = {"case": f"{mix}/0", "failed": None, "squares": squares}
    assert errors.judge([record]).met
    record["squares"] = squares | {"token nearest": values | {name: 1.9}}
    assert not errors.judge([record]).met


def test_our_side_runs_under_autocast_too():
    """Outside it, an fp32 layer stays fp32."""
    problem = make_problem(5, 6, 7, 2)
    assert solve(problem)["y"].dtype == torch.float32
    assert solve(problem, torch.bfloat16)["y"].dtype == torch.bfloat16
