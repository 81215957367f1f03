"""The rows on faults, hostile input and damage count what happened, and each thing once."""

import os
import random

import pytest

from tests.support.disk_faults import Faults

from . import adapters, command_lines, paths, write_faults


def faults(count, **changed):
    record = {"case": "", "failed": None, "scenario": "run", "kind": "full", "delivered": True, "detected": True}
    return [record | {"call": f"write {number}"} | changed for number in range(count)]


def test_write_faults_count_once_and_only_if_they_happened():
    enough = faults(write_faults.LEAST)
    assert write_faults.judge(enough).met
    assert not write_faults.judge(enough[1:]).met
    assert not write_faults.judge(enough[1:] + enough[1:2]).met, "the same fault twice"
    assert not write_faults.judge(enough[1:] + faults(1, call="rename", delivered=False)).met
    assert not write_faults.judge(enough[1:] + faults(1, call="rename", detected=False)).met
    assert not write_faults.judge([*enough, {"case": "", "failed": "AssertionError"}]).met


@pytest.mark.parametrize("row", [adapters, command_lines])
def test_generated_cases_count_once(row):
    half = row.LEAST // 2
    good = [{"failed": None, "made": [f"{batch}-{number}" for number in range(half)]} for batch in range(2)]
    assert row.judge(good).met
    assert not row.judge([good[0], good[0]]).met
    assert not row.judge([*good, {"failed": "AssertionError"}]).met


def test_hostile_paths_count_once_and_what_should_work_does():
    kinds = (*paths.WORKS, "save", "merge", "export", "load")
    chosen = [kinds[number % len(kinds)] for number in range(paths.LEAST)]
    good = [
        {"failed": None, "kind": kind, "given": str(number), "refused": kind == "load"}
        for number, kind in enumerate(chosen)
    ]
    assert paths.judge(good).met
    assert not paths.judge(good[1:] + good[1:2]).met, "the same path twice"
    assert not paths.judge([*good, {"failed": "AssertionError"}]).met
    for kind in kinds[:-1]:
        assert not paths.judge([r | {"refused": r["refused"] or r["kind"] == kind} for r in good]).met, kind


def test_a_hostile_path_that_writes_outside_or_is_refused_for_nothing_fails(monkeypatch):
    def outside(sandbox, given):
        (sandbox / "home" / "file").touch()

    def refuses(sandbox, given):
        raise SystemExit("error: unrecognized arguments: --renamed")

    kind = paths.WORKS[0]
    for attempt, message in ((outside, "changed: .*home/file"), (refuses, "was refused")):
        monkeypatch.setitem(paths.ATTEMPTS, kind, attempt)
        with pytest.raises(AssertionError, match=message):
            paths.run(f"{kind}-0")


def test_a_corruption_changes_something_and_no_parameter_is_left_out(monkeypatch, tmp_path):
    changes = [False, True]

    def sometimes(directory, chance, source):
        if changes.pop(0):
            (directory / "adapter_config.json").write_text("{}")
        return "config"

    monkeypatch.setitem(adapters.CORRUPT, "config", sometimes)
    adapters.corrupt(tmp_path / "adapter", "config", random.Random(0), "ours")
    assert not changes
    sound, values = adapters.good("ours"), adapters.expected("ours")
    assert not adapters.attempt(sound, "ours", values)
    with pytest.raises(AssertionError, match="other parameters"):
        adapters.attempt(sound, "ours", values | {"one more": None})


def test_a_fault_that_does_not_happen_says_so(tmp_path):
    def write():
        tmp_path.joinpath("folder").mkdir(exist_ok=True)
        tmp_path.joinpath("empty").touch()
        with tmp_path.joinpath("opened").open("w"):
            pass
        tmp_path.joinpath("written").write_text("content")
        os.remove(tmp_path / "empty")

    tmp_path.joinpath("folder").mkdir()
    with Faults(tmp_path) as counted:
        write()
    assert [call.split()[0] for call in counted.calls] == ["write", "write", "remove"], "what is there is not made"
    with Faults(tmp_path, 0) as unhappened:
        write()
    assert unhappened.struck and not unhappened.delivered
    with Faults(tmp_path, 1, "torn") as torn, pytest.raises(OSError, match="No space left"):
        write()
    assert torn.delivered and tmp_path.joinpath("written").read_text() == "con"


@pytest.mark.parametrize(
    "words, asked, helps",
    [
        ("unrecognized arguments: -x", ["-x"], True),
        ("the value of target_modules is not good", {"r": 1}, False),
        ("`r` should be a positive integer", {"r": 0}, True),
        ("argument --lora_r: invalid int value", ["--lora_r=x"], True),
        ("something about a module is not as it should be", ["--lora_r=x"], False),
        ("'<' not supported between lora_r and str", ["--lora_r=x"], False),
    ],
)
def test_words_help_if_they_name_what_was_passed(words, asked, helps):
    try:
        command_lines.check_words(asked, words)
    except AssertionError:
        assert not helps
    else:
        assert helps
