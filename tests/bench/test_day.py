"""`bench day` without its measurements: the folder, the order and the time of steps, what died, and who is ended."""

import argparse
import json
import sys

import pytest
import torch

from bench.day import conductor, folder, report, steps, worker
from bench.day.folder import FILES, KERNELS, PART, STATE, Folder, commit_of_tree
from bench.day.step import Done, Step
from bench.day.worker import Day, work
from bench.rows.records import read_rows


@pytest.fixture
def gpu(monkeypatch):
    """The few answers that the worker itself asks for."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(worker.clocks, "read", lambda device: {})
    monkeypatch.setattr(report, "write", lambda folder: None)
    monkeypatch.setattr(Folder, "pack_kernels", lambda *_: None)
    now = [0.0]
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    return now


def a_day(path, seconds):
    found = Folder(path)
    found.state["commit"] = "test"
    return Day(found, "tiny", seconds, rehearsed=False)


def a_step(name, takes, now, ran, minutes=1.0, cases=3):
    """One of `cases` cases, each of which takes so many seconds; it begins none that would end too late."""
    left = [cases]

    def run(day, step, seconds):
        until = now[0] + seconds
        while left[0] and now[0] + takes <= until:
            now[0] += takes
            left[0] -= 1
            ran.append(name)
            day.folder.step(name)["cases"] += 1
        return Done(0, left[0])

    return Step(name, f"{name} title", minutes, lambda day: cases, takes, run)


def test_steps_run_in_order_within_their_minutes_and_then_what_is_left(tmp_path, gpu, capsys):
    """The first would take 90 s and has 60: its last case runs after the others."""
    ran = []
    found = [a_step("a", 30.0, gpu, ran), a_step("b", 10.0, gpu, ran)]
    assert work(a_day(tmp_path, 500), found) == 0
    assert ran == ["a", "a", "b", "b", "b", "a"]
    assert all(Folder(tmp_path).step(name)["done"] for name in "ab")
    printed = capsys.readouterr().out
    assert "== a: a title\n   3 cases of 30.0 s (assumed), about 90 s" in printed
    assert "1 cases of 30.0 s (as measured), about 30 s" in printed
    assert "s to compile kernels" in printed


def test_another_slice_goes_on(tmp_path, gpu, capsys):
    ran = []
    found = [a_step("a", 10.0, gpu, ran), a_step("b", 10.0, gpu, ran)]
    work(a_day(tmp_path, 32), found)
    assert ran == ["a", "a"] and "b: not begun" in capsys.readouterr().out
    work(a_day(tmp_path, 500), found)
    assert ran == ["a"] * 3 + ["b"] * 3
    work(a_day(tmp_path, 500), found)
    assert ran == ["a"] * 3 + ["b"] * 3


def test_what_a_cut_step_has_spent_is_kept(tmp_path, gpu):
    """As when a lost context ends the process inside a step."""

    def run(day, step, seconds):
        gpu[0] += 7
        sys.exit(3)

    with pytest.raises(SystemExit):
        work(a_day(tmp_path, 100), [Step("a", "", 1, lambda day: 1, 1, run)])
    known = Folder(tmp_path).step("a")
    assert known["seconds"] == 7 and not known["done"]


def test_a_case_that_took_its_process_with_it_is_a_row_and_not_tried_again(tmp_path, monkeypatch):
    day = a_day(tmp_path, 100)
    day.device, case = torch.device("cpu"), {"tokens": 8}
    day.folder.begin("layer", "layer", case)

    class OnCpu(worker.DaySession):
        def __init__(self, day, step, seconds):
            from bench.rows.records import Records, stamp

            self.records = Records(day.folder.path / folder.RESULTS, stamp(day.device, "test"))

    monkeypatch.setattr(worker, "DaySession", OnCpu)
    worker.record_death(day)
    (row,) = read_rows([tmp_path / folder.RESULTS])
    assert row["case"] == case and "the process died" in row["failed"]
    state = json.loads((tmp_path / STATE).read_text())
    assert state["running"] is None and state["deaths"][0]["step"] == "layer" and state["steps"]["layer"]["failed"] == 1
    assert state["steps"]["layer"]["cases"] == 1
    worker.record_death(day)
    assert len(read_rows([tmp_path / folder.RESULTS])) == 1


def test_a_step_that_is_broken_costs_no_other(tmp_path, gpu, capsys):
    ran = []

    def broken(day, step, seconds):
        raise RuntimeError("no such thing")

    found = [Step("a", "", 1, lambda day: 1, 1, broken), a_step("b", 1.0, gpu, ran)]
    assert work(a_day(tmp_path, 100), found) == 1
    assert len(ran) == 3 and "no such thing" in capsys.readouterr().err


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    found = Folder(tmp_path)
    found.write("report.md", "first")

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder.os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        found.write("report.md", "second")
    assert (tmp_path / "report.md").read_text() == "first"
    assert (tmp_path / PART).exists()
    Folder(tmp_path).clean()
    assert not (tmp_path / PART).exists()


def test_there_are_no_more_files_than_a_lent_machine_hands_back():
    assert len(FILES) <= 8
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz._-") for name in FILES)


def test_compiled_kernels_come_back_with_what_they_are_loaded_from(tmp_path):
    cache = tmp_path / "cache"
    (cache / "key").mkdir(parents=True)
    for suffix in (".json", ".cubin", ".so", ".ptx", ".ttir"):
        (cache / "key" / f"kernel{suffix}").write_text(suffix)
    Folder(tmp_path / "out").pack_kernels(cache)
    assert (tmp_path / "out" / KERNELS).exists()
    Folder(tmp_path / "out").unpack_kernels(tmp_path / "other")
    assert {path.name for path in (tmp_path / "other" / "key").iterdir()} == {
        "kernel.json", "kernel.cubin", "kernel.so",
    }  # fmt: skip


def test_a_tree_without_history_is_known_by_its_sources(tmp_path, monkeypatch):
    """`Records` measures a tree of an unknown commit again and again: a day would never go on."""
    monkeypatch.setattr(folder, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.py").write_text("a = 1")
    first = commit_of_tree()
    assert first.startswith("sources-") and commit_of_tree() == first
    (tmp_path / "bench" / "a.py").write_text("a = 2")
    assert commit_of_tree() not in (first, "unknown")


def slice_of(path, **options):
    defaults = {"out": path, "minutes": 1.0, "steps": None, "commit": "test", "rehearse": True, "report": False}
    return argparse.Namespace(**(defaults | options))


@pytest.fixture
def workers(monkeypatch):
    """Runs the given Python in the worker's place."""
    popen = conductor.subprocess.Popen

    def use(source):
        monkeypatch.setattr(
            conductor.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", source], **options)
        )

    return use


def test_a_worker_that_loses_the_gpu_is_followed_by_another(tmp_path, workers, capsys):
    workers(f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'n')!r}); p.open('a').write('x');"
            "print('hello'); sys.exit(0 if len(p.read_text()) == 3 else 3)")  # fmt: skip
    assert conductor.main(slice_of(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert printed.count("hello") == 3 and printed.count("a worker ended with 3") == 2
    assert (tmp_path / "out" / "log.txt").read_text() == printed


def test_a_worker_that_hangs_is_ended(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(conductor, "DEATHS", 1)
    workers("import time; time.sleep(600)")
    monkeypatch.setattr(conductor, "hangs", lambda path: True)
    assert conductor.main(slice_of(tmp_path, rehearse=False)) == -9


def test_what_was_running_when_the_time_was_over_is_tried_again(tmp_path, workers, monkeypatch):
    """A cut from outside leaves it running on paper; the next slice, which is over at once, does not."""
    monkeypatch.setattr(conductor, "GRACE", 0.0)
    monkeypatch.setattr(conductor, "SHORTEST", 0.0)
    Folder(tmp_path).begin("layer", "layer", {})
    workers("import time; time.sleep(600)")
    conductor.main(slice_of(tmp_path, minutes=0.01))
    assert Folder(tmp_path).state["running"] is None


def test_a_folder_of_another_commit_is_refused(tmp_path, capsys):
    out = Folder(tmp_path)
    out.state["commit"] = "other"
    out.save()
    assert conductor.main(slice_of(tmp_path)) == 2
    assert "use another folder" in capsys.readouterr().out


def test_a_case_that_runs_for_too_long_hangs(tmp_path, monkeypatch):
    found = Folder(tmp_path)
    found.save()
    assert not conductor.hangs(tmp_path)
    found.begin("layer", "layer", {})
    assert not conductor.hangs(tmp_path)
    monkeypatch.setattr(conductor, "HANGS", -1.0)
    assert conductor.hangs(tmp_path)


def test_the_day_ends_within_a_lent_machines_time():
    """Three slices of nine minutes: boxes of all steps together, and what starting costs."""
    assert sum(step.minutes for step in steps.STEPS) <= 27
