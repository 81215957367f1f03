"""The whole of `bench day --rehearse`, cut after each step and killed in the middle of one. `make rehearse` runs it.

Named so that plain `pytest` leaves it out: it takes minutes.
"""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench.day.folder import FILES, KERNELS, REPORT, RESULTS, STATE, TESTS, THRESHOLDS, Folder
from bench.rows.records import read_rows

ROOT = Path(__file__).parents[2]
STEPS = ("compile", "selftest", "tests", "roofs", "kernels", "layer", "model", "questions", "thresholds")
KILLED, LOSES = "layer", "kernels"
"""The step that is killed, and the one whose GPU is lost: a case that fails as a whole is the exit status."""
FAILS = {"kernels": "the GPU's context was lost by", "layer": "out of memory"}
"""What is planned to go wrong, in which step."""


def command(out, *flags):
    # Of one commit, whatever becomes of the tree while it runs.
    where = ["--out", str(out), "--commit", "rehearsed"]
    return [sys.executable, "-m", "bench", "day", "--rehearse", *where, "--minutes", "30", *flags]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("day") / "out"


def check(out):
    """What has been written is whole: each file can be read, and there are no others."""
    assert {path.name for path in out.iterdir()} <= set(FILES)
    assert len(list(out.iterdir())) <= 8
    state = json.loads((out / STATE).read_text())
    if (out / RESULTS).exists():
        assert all(row["stamp"] and row["case"] for row in read_rows([out / RESULTS]))
    if (out / TESTS).exists():
        assert all(suite.get("tests") for suite in ET.parse(out / TESTS).getroot())
    if (out / REPORT).exists():
        assert (out / REPORT).read_text().startswith("# A day on a GPU")
    if (out / KERNELS).exists():
        Folder(out).unpack_kernels(out.parent / "kernels")
    return state


def kill_in_the_middle(out):
    """Kills the conductor while the step runs; its worker ends with it."""
    process = subprocess.Popen(command(out, "--steps", KILLED), cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        running = Folder(out).state["running"]
        if running and running["step"] == KILLED:
            break
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it could be killed"
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.kill()
    process.wait()
    for worker in map(int, workers):
        while _is_alive(worker):
            time.sleep(0.05)


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("step", STEPS)
def test_each_step_goes_on_where_the_last_was_cut(out, step):
    if step == KILLED:
        kill_in_the_middle(out)
        assert check(out)["running"]["step"] == KILLED
    done = subprocess.run(command(out, "--steps", step), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == int(step == LOSES), done.stdout + done.stderr
    state = check(out)
    assert f"== {step}: " in done.stdout and ", about " in done.stdout, "each step says what it will cost"
    assert state["running"] is None and state["steps"][step]["done"], done.stdout
    for other in STEPS[: STEPS.index(step)]:
        assert f"== {other}: " not in done.stdout, "what is done is not run again"


def test_what_went_wrong_is_said(out):
    report, rows = (out / REPORT).read_text(), read_rows([out / RESULTS])
    for step, words in FAILS.items():
        (failed,) = [row for row in rows if row["command"] == step and words in (row["failed"] or "")]
        assert failed["failed"] in report
    assert not [row for row in rows if "the process died" in (row["failed"] or "")], "a cut is no fault of the case"
    others = [row for row in rows if row["failed"] and row["command"] not in FAILS]
    assert not others, others


def test_the_report_has_every_part(out):
    report = (out / REPORT).read_text()
    for part in ("Headline", "Steps", "model", "layer", "kernels", "Roofs", "Predicted beside measured", "Questions",
                 "Proposed constants", "Tests"):  # fmt: skip
        assert f"## {part}\n" in report, part
    assert "12473" in report and "PEFT DoRA bf16" in report and "PEFT LoRA fp32, autocast" in report
    assert "1980 MHz SM" in report
    proposal = json.loads((out / THRESHOLDS).read_text())
    assert proposal["SHORTEST_LAUNCH"]["proposed"] > 0 and proposal["WEIGHT_SPACE_FACTOR"]["cases"] > 0


def test_every_branch_of_cuda_was_asked(out):
    log = (out / "log.txt").read_text()
    asked = {call.rpartition(" ")[0] for line in log.splitlines() if line.startswith("CUDA was asked: ")
             for call in line.partition(": ")[2].split(", ")}  # fmt: skip
    needed = {"Event", "Event.record", "synchronize", "_sleep", "Stream", "wait_stream", "CUDAGraph", "graph", "replay",
              "empty_cache", "reset_peak_memory_stats", "max_memory_allocated", "profile", "device"}  # fmt: skip
    assert needed <= asked, needed - asked


def test_a_day_that_is_over_runs_nothing(out):
    before = (out / RESULTS).read_bytes()
    done = subprocess.run(command(out), cwd=ROOT, capture_output=True, text=True)
    assert "== " not in done.stdout and (out / RESULTS).read_bytes() == before
