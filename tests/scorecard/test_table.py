"""The scorecard's own machinery: an interrupted row goes on, a failure is a failure, other lines stay."""

import json

import pytest

from . import failure_modes, mutations, table
from . import row as rows
from .row import NAMES, Row, Verdict, module, none_fail

STAMP = {"commit": "0123456789ab", "date": "2026-01-02"}


def row_of(run, count=4, at_least=4):
    return Row("figure", "target", lambda: map(str, range(count)), run, none_fail(at_least))


def measure(row, path, stamp=STAMP, head=None):
    return rows.measure("name", row, path, stamp, head or (lambda: stamp["commit"]))


def test_a_failure_is_counted_and_the_others_go_on(tmp_path):
    def run(case):
        assert case != "2", "two"
        return {"figure": int(case)}

    row = row_of(run)
    records = measure(row, tmp_path / "row.jsonl")
    assert [record["failed"] is None for record in records] == [True, True, False, True]
    assert records[2]["failed"].startswith("AssertionError: two")
    assert [record.get("figure") for record in records] == [0, 1, None, 3]
    assert row.judge(records) == Verdict("4 cases, 1 failures", False)


def test_too_few_cases_do_not_meet_the_target(tmp_path):
    row = row_of(lambda case: {}, count=3)
    assert not row.judge(measure(row, tmp_path / "row.jsonl")).met


def test_an_interrupted_row_goes_on(tmp_path):
    path, ran, interrupts = tmp_path / "row.jsonl", [], [KeyboardInterrupt]

    def run(case):
        if case == "2" and interrupts:
            raise interrupts.pop()
        ran.append(case)
        return {}

    with pytest.raises(KeyboardInterrupt):
        measure(row_of(run), path)
    with path.open("a") as file:
        file.write('{"case": "2", "fai')  # what a kill leaves of a line
    after_midnight = STAMP | {"date": "2026-01-03"}
    assert len(measure(row_of(run), path, after_midnight)) == 4
    assert ran == ["0", "1", "2", "3"]
    stamp, *records = [json.loads(line) for line in path.read_text().splitlines()]
    assert stamp == after_midnight and [record["case"] for record in records] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("commit", ["ba9876543210", "0123456789ab-changed"])
def test_what_another_tree_measured_is_not_kept(tmp_path, commit):
    path, ran = tmp_path / "row.jsonl", []
    row = row_of(lambda case: ran.append(case) or {})
    stamp = STAMP | {"commit": commit}
    measure(row, path, STAMP if commit == "ba9876543210" else stamp)
    measure(row, path, stamp)
    assert len(ran) == 8


def test_a_case_during_which_the_tree_changed_is_not_kept(tmp_path):
    path, heads = tmp_path / "row.jsonl", iter([STAMP["commit"], "ba9876543210"])
    with pytest.raises(SystemExit, match="the tree was 0123456789ab and is ba9876543210 now"):
        measure(row_of(lambda case: {}), path, head=lambda: next(heads))
    assert [json.loads(line)["case"] for line in path.read_text().splitlines()[1:]] == ["0"]


@pytest.mark.parametrize("exception", [SystemExit(2), pytest.fail.Exception("no"), pytest.skip.Exception("no")])
def test_what_is_no_exception_of_the_case_fails_it_too(tmp_path, exception):
    def run(case):
        raise exception

    assert rows.failures(measure(row_of(run), tmp_path / "row.jsonl"))[3]["case"] == "3"


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


def test_every_wrong_engine_can_still_be_made():
    """Each fault fits the source as it is now and leaves Python, and the tests it names exist."""
    every = mutations.mutants().values()
    for mutant in every:
        compile(mutant.applied(mutations.ROOT), mutant.file, "exec")
        assert_tests_exist(mutant.tests.split())
    assert len(every) >= 40
    assert sum(mutant.kind == "gradient" for mutant in every) >= 12
    assert sum(mutant.in_a_kernel for mutant in every) >= 8


def test_every_failure_mode_names_tests_that_exist():
    modes = failure_modes.modes()
    assert list(modes) == list(range(1, failure_modes.COUNT + 1))
    for mode in modes.values():
        assert mode.tests
        assert_tests_exist([*mode.tests, *mode.gpu])


def assert_tests_exist(names):
    for name in names:
        file, _, function = name.partition("[")[0].partition("::")
        text = (mutations.ROOT / "tests" / f"{file}.py").read_text()
        assert not function or f"def {function}(" in text, name


def test_a_survivor_a_red_control_or_a_live_gradient_misses_the_target():
    ids = [mutations.UNCHANGED, *mutations.mutants()]
    gradient = next(id for id, mutant in mutations.mutants().items() if mutant.kind == "gradient")
    other = next(id for id, mutant in mutations.mutants().items() if mutant.kind != "gradient")

    def met(*alive):
        return mutations.judge([{"case": id, "failed": "survives" if id in alive else None} for id in ids]).met

    assert met() and met(other)
    assert not met(gradient)
    assert not met(mutations.UNCHANGED)


def test_a_mode_that_waits_for_a_gpu_is_not_counted():
    records = [{"case": str(number), "failed": None, "tests": 1, "gpu": None} for number in range(1, 30)]
    assert failure_modes.judge(records) == Verdict("29 of 29", True)
    records[18]["gpu"] = failure_modes.NOT_RUN
    verdict = failure_modes.judge(records)
    assert verdict == Verdict(f"28 of 29; 1 more hold on a CPU and are {failure_modes.NOT_RUN}: 19", False)
    found = {
        "tests.test_x::test_a[1]": "passed",
        "tests.test_x::test_a[2]": "skipped",
        "tests.test_x::test_ab": "failed",
    }
    assert not failure_modes.holds("test_x::test_a", found), "a part of it was skipped"
    assert failure_modes.holds("test_x::test_a[1]", found) and not failure_modes.holds("test_x::test_b", found)
