"""The whole of `bench day --rehearse`, killed in the middle of a step. `make rehearse` runs it.

Named so that plain `pytest` leaves it out: it takes minutes.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench.day.folder import FILES, KERNELS, LOG, REPORT, RESULTS, STATE, TESTS, THRESHOLDS, Folder
from bench.rows.records import read_rows

ROOT = Path(__file__).parents[2]
STEPS = ("compile", "selftest", "tests", "roofs", "kernels", "layer", "block", "experts", "model", "questions")
STEPS += ("thresholds",)
KILLED = "model"
FAILS = {"questions": "the GPU's context was lost by", "layer": "out of memory"}
"""What is planned to go wrong, in which step."""


def start(out):
    # Of one commit, whatever becomes of the tree while it runs.
    where = ["--out", str(out), "--commit", "rehearsed", "--minutes", "30"]
    return subprocess.Popen([sys.executable, "-m", "bench", "day", "--rehearse", *where], cwd=ROOT)


class Day:
    """A day that is killed in one step and then runs to its end; `cuts` holds the folder as each step began."""

    def __init__(self, path):
        self.out, self.cuts = path / "out", path / "cuts"
        killed = start(self.out)
        self.watch(killed, until=lambda state: (state["running"] or {}).get("step") == KILLED)
        assert killed.poll() is None, "it ended before it could be killed"
        workers = subprocess.run(["pgrep", "-P", str(killed.pid)], capture_output=True, text=True).stdout.split()
        killed.kill()
        killed.wait()
        while any(map(_is_alive, map(int, workers))):
            time.sleep(0.05)
        self.killed = check(self.out)
        last = start(self.out)
        self.watch(last)
        self.exit_status = last.wait()
        *_, self.log = (self.out / LOG).read_text().partition("slice 2: ")

    def watch(self, process, until=lambda state: False):
        """Copies the folder whenever a step has begun: what a cut at that moment would leave."""
        while process.poll() is None:
            state = Folder(self.out).state
            for step in state["steps"]:
                if not (self.cuts / step).exists():
                    (self.cuts / step).mkdir(parents=True)
                    for file in self.out.iterdir():
                        if file.name in FILES[:-1]:  # not the part of a file, which may be gone
                            shutil.copy(file, self.cuts / step)
            if until(state):
                return
            time.sleep(0.05)


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    return Day(tmp_path_factory.mktemp("day"))


def check(out):
    """What has been written is whole: each file can be read, and there are no others."""
    assert {path.name for path in out.iterdir()} <= set(FILES)
    state = json.loads((out / STATE).read_text())
    if (out / RESULTS).exists():
        assert all(row["stamp"] and row["case"] for row in read_rows([out / RESULTS]))
    if (out / TESTS).exists():
        assert all(suite.get("tests") for suite in ET.parse(out / TESTS).getroot())
    if (out / REPORT).exists():
        assert (out / REPORT).read_text().startswith("# A day on a GPU")
    if (out / KERNELS).exists():
        with tarfile.open(out / KERNELS) as kernels:
            assert any(name.endswith(".cubin") for name in kernels.getnames())
    return state


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_every_step_ran_to_its_end(day):
    state = check(day.out)
    assert tuple(state["steps"]) == STEPS and all(known["done"] for known in state["steps"].values())
    assert state["running"] is None
    # A case that failed as a whole, the one that lost the context, is the exit status.
    assert day.exit_status == 1 and [name for name in STEPS if state["steps"][name]["failed"]] == ["questions"]


@pytest.mark.parametrize("step", STEPS)
def test_a_cut_leaves_what_was_done_and_each_step_says_its_cost(day, step):
    state = check(day.cuts / step)
    before = STEPS[: STEPS.index(step)]
    assert all(state["steps"][name]["done"] for name in before)
    assert (day.cuts / step / REPORT).exists() is bool(before)
    assert " s (" in state["steps"][step]["cost"] and ", about " in state["steps"][step]["cost"]


def test_another_slice_goes_on_where_the_last_was_killed(day):
    assert day.killed["running"]["step"] == KILLED
    for step in STEPS:
        assert (f"== {step}: " in day.log) is (step in STEPS[STEPS.index(KILLED) :]), step
    cost = day.log.partition(f"== {KILLED}: ")[2].splitlines()[1]
    assert cost.lstrip().startswith("2 cases of"), "the one that was killed is left, and the next"


def test_what_went_wrong_is_said(day):
    report, rows = (day.out / REPORT).read_text(), read_rows([day.out / RESULTS])
    for step, words in FAILS.items():
        (failed,) = [row for row in rows if row["command"] == step and words in (row["failed"] or "")]
        assert failed["failed"] in report
    assert not [row for row in rows if "the process died" in (row["failed"] or "")], "a cut is no fault of the case"
    failed = [row for row in rows if row["failed"] and row["command"] not in FAILS]
    # What PEFT cannot do is said in the row.
    cannot = [row for row in failed if row["contestant"] == "PEFT DoRA fp32" and "ParamWrapper" in row["failed"]]
    assert len(cannot) == 1 and failed == cannot, failed


def test_the_report_has_every_part(day):
    report = (day.out / REPORT).read_text()
    for part in ("Headline", "Steps", "model", "experts", "block", "layer", "kernels", "Roofs", "Questions", "Tests",
                 "Predicted beside measured", "Proposed constants"):  # fmt: skip
        assert f"## {part}\n" in report, part
    assert "12473" in report and "PEFT DoRA bf16" in report and "PEFT LoRA fp32, autocast" in report
    assert "1980 MHz SM" in report
    proposal = json.loads((day.out / THRESHOLDS).read_text())
    assert proposal["SHORTEST_LAUNCH"]["proposed"] > 0 and proposal["WEIGHT_SPACE_FACTOR"]["cases"] > 0


def test_every_branch_of_cuda_was_asked(day):
    asked = {call.rpartition(" ")[0] for line in day.log.splitlines() if line.startswith("CUDA was asked: ")
             for call in line.partition(": ")[2].split(", ")}  # fmt: skip
    needed = {"Event", "Event.record", "synchronize", "_sleep", "Stream", "wait_stream", "CUDAGraph", "graph", "replay",
              "empty_cache", "reset_peak_memory_stats", "max_memory_allocated", "device"}  # fmt: skip
    assert needed <= asked, needed - asked


def test_the_report_is_written_again_by_four_roofs(day):
    again = [sys.executable, "-m", "bench", "day", "--report", "--out", str(day.out)]
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(again, cwd=ROOT, env=compiling, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    check(day.out)
    report = (day.out / REPORT).read_text()
    assert "launches are within 15% of their prediction" in report and "Our kernels by four roofs" in report
