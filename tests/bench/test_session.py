"""A run of the benchmark suite from its first case to its last: what is done, what is left, and what broke."""

import argparse
import json

import pytest
import torch

from bench.measuring import timing
from bench.measuring.timing import ContextLost, attempt, interleaved
from bench.rows import session as sessions
from bench.rows.records import Records, read_rows
from bench.rows.session import EVERYBODY, Session

CASE = {"tokens": 8}
RESULTS = {"ours": {"failed": None}}


def start(path, commit="a", minutes=None, repetitions=2, again=False):
    arguments = {"device": "cpu", "preset": "tiny", "threads": None, "output": path}
    return Session(
        argparse.Namespace(**arguments, commit=commit, minutes=minutes, repetitions=repetitions, again=again)
    )


def fails(error):
    def call():
        raise error

    return call


def test_a_case_that_is_done_is_said_and_skipped(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    first = start(path)
    assert not first.skips("layer", CASE)
    assert first.measure("layer", CASE, lambda: RESULTS) == RESULTS
    capsys.readouterr()
    assert start(path).skips("layer", CASE)
    assert "held already: layer, tokens 8" in capsys.readouterr().out
    # Another measurement: other repetitions, another commit, or asked for again.
    for other in ({"repetitions": 3}, {"commit": "b"}, {"again": True}):
        assert not start(path, **other).skips("layer", CASE)


@pytest.mark.parametrize("commit", ["a-changed", "unknown"])
def test_a_tree_without_a_commit_is_measured_again(tmp_path, commit):
    """Nothing tells its changes from those of the next run."""
    path = tmp_path / "r.jsonl"
    start(path, commit=commit).measure("layer", CASE, lambda: RESULTS)
    assert not start(path, commit=commit).skips("layer", CASE)


def test_no_case_is_started_that_would_end_too_late(tmp_path, monkeypatch, capsys):
    """60 s in all: the first case took 40, so a second would end after 80."""
    now = [0.0]
    monkeypatch.setattr(sessions.time, "monotonic", lambda: now[0])

    def call():
        now[0] += 40
        return RESULTS

    run = start(tmp_path / "r.jsonl", minutes=1)
    assert not run.skips("layer", CASE)
    run.measure("layer", CASE, call)
    assert "40 s" in capsys.readouterr().out
    assert run.skips("layer", {"tokens": 16})
    assert not run.skips("kernels", CASE)  # of another kind nothing is known
    assert run.finish() == 0
    assert "1 cases left" in capsys.readouterr().out


def test_a_case_that_fails_as_a_whole_is_a_row_and_the_exit_status(tmp_path):
    path = tmp_path / "r.jsonl"
    run = start(path)
    assert run.measure("layer", CASE, fails(torch.OutOfMemoryError("no"))) is None
    assert run.measure("layer", {"tokens": 16}, lambda: RESULTS) == RESULTS
    assert run.finish() == 1
    failed, done = read_rows([path])
    assert (failed["contestant"], failed["failed"]) == (EVERYBODY, "out of memory")
    assert done["failed"] is None


def test_a_lost_context_ends_the_run_and_its_case(tmp_path, monkeypatch, capsys):
    """As after an access out of bounds: every later call to the GPU fails. The next process goes on after that case."""
    monkeypatch.setattr(timing.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", fails(RuntimeError("CUDA error: an illegal memory access")))
    path = tmp_path / "r.jsonl"
    run = start(path)
    with pytest.raises(SystemExit) as stopped:
        run.measure("layer", CASE, lambda: attempt(fails(RuntimeError("CUDA error: it was")), who="PEFT"))
    assert stopped.value.code == 3
    (row,) = read_rows([path])
    assert row["failed"] == "the GPU's context was lost by PEFT: RuntimeError: CUDA error: it was"
    assert start(path).skips("layer", CASE)


def test_who_lost_the_context_among_those_that_are_timed(monkeypatch):
    monkeypatch.setattr(timing.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", fails(RuntimeError("CUDA error")))
    with pytest.raises(ContextLost, match="broken: ValueError: no"):
        interleaved({"broken": fails(ValueError("no"))}, torch.device("cpu"), repetitions=1)


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory. Tried to allocate", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"],
)
def test_memory_that_ran_out_is_said_in_one_way(message):
    assert attempt(fails(RuntimeError(message))) == (None, "out of memory")


def test_repetitions_run_in_other_orders():
    ran = []

    def contestant(name):
        def phases():
            ran.append(name)
            yield "call"

        return phases

    interleaved({name: contestant(name) for name in "abcd"}, torch.device("cpu"), repetitions=8, warmup=0)
    rounds = ["".join(ran[i : i + 4]) for i in range(0, 32, 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 4


def test_a_line_that_a_kill_cut_short_costs_no_other(tmp_path):
    path = tmp_path / "r.jsonl"
    stamp = {"commit": "a", "date": "2000-01-01"}
    Records(path, stamp).add("layer", CASE, RESULTS)
    with path.open("a") as file:
        file.write('{"command": "la')
    assert len(read_rows([path])) == 1
    Records(path, stamp).add("layer", {"tokens": 16}, RESULTS)
    assert [json.loads(line)["case"]["tokens"] for line in path.read_text().splitlines()] == [8, 16]


def test_the_head_start_comes_before_the_first_event(monkeypatch):
    made = []
    event = type("Event", (), {"record": lambda self: made.append("event"), "elapsed_time": lambda self, end: 1.0})
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: made.append("sleep"), raising=False)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 8)
    for head_start, expected in ((True, ["sleep", "event", "event"]), (False, ["event", "event"])):
        made.clear()
        timing._cuda_clock(torch.device("cpu"), head_start)(lambda: iter(["call"]))
        assert made == expected
