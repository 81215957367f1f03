"""The rows on faults, hostile input and damage count what happened, and each thing once."""

import os

import pytest

from tests.faults import Faults
from tests.scorecard import adapters, command_lines, write_faults


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
