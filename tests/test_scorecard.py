"""The scorecard's own machinery: an interrupted row goes on, a failure is a failure, other lines stay."""

import json

import pytest

from tests.scorecard import table
from tests.scorecard.row import NAMES, Row, Verdict, measure, module, none_fail

STAMP = {"commit": "0123456789ab", "date": "2026-01-02"}


def row_of(run, count=4, at_least=4):
    return Row("figure", "target", lambda: map(str, range(count)), run, none_fail(at_least))


def test_a_failure_is_counted_and_the_others_go_on(tmp_path):
    def run(case):
        assert case != "2", "two"
        return {"figure": int(case)}

    row = row_of(run)
    records = measure("name", row, tmp_path / "row.jsonl", STAMP)
    assert [record["failed"] is None for record in records] == [True, True, False, True]
    assert records[2]["failed"].startswith("AssertionError: two")
    assert [record.get("figure") for record in records] == [0, 1, None, 3]
    assert row.judge(records) == Verdict("4 cases, 1 failures", False)


def test_too_few_cases_do_not_meet_the_target(tmp_path):
    row = row_of(lambda case: {}, count=3)
    assert not row.judge(measure("name", row, tmp_path / "row.jsonl", STAMP)).met


def test_an_interrupted_row_goes_on(tmp_path):
    path, ran, interrupts = tmp_path / "row.jsonl", [], [KeyboardInterrupt]

    def run(case):
        if case == "2" and interrupts:
            raise interrupts.pop()
        ran.append(case)
        return {}

    with pytest.raises(KeyboardInterrupt):
        measure("name", row_of(run), path, STAMP)
    with path.open("a") as file:
        file.write('{"case": "2", "fai')  # what a kill leaves of a line
    assert len(measure("name", row_of(run), path, STAMP)) == 4
    assert ran == ["0", "1", "2", "3"]
    stamp, *records = [json.loads(line) for line in path.read_text().splitlines()]
    assert stamp == STAMP and [record["case"] for record in records] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("commit", ["ba9876543210", "0123456789ab-changed"])
def test_what_another_tree_measured_is_not_kept(tmp_path, commit):
    path, ran = tmp_path / "row.jsonl", []
    row = row_of(lambda case: ran.append(case) or {})
    stamp = STAMP | {"commit": commit}
    measure("name", row, path, STAMP if commit == "ba9876543210" else stamp)
    measure("name", row, path, stamp)
    assert len(ran) == 8


def test_other_lines_of_the_table_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "PATH", tmp_path / "SCORECARD.md")
    row = row_of(lambda case: {})
    first, second = NAMES[0], NAMES[1]
    table.write({first: table.line(first, row, Verdict("old | figure", True), STAMP)})
    table.write({second: table.line(second, row, Verdict("new", False), STAMP)})
    lines = table.PATH.read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == len(NAMES)
    assert rows[0].endswith("| old \\| figure | yes | 0123456789ab | 2026-01-02 |")
    assert rows[1].endswith("| new | **no** | 0123456789ab | 2026-01-02 |")
    assert all("not run | **no**" in line for line in rows[2:])


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_its_module(name):
    row = module(name).ROW
    assert row.what and row.target and callable(row.run)
