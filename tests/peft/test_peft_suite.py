"""The judge of PEFT's suite: it must see a test that fails, one that vanishes, and layers that fell back to PEFT."""

from collections import Counter

import pytest

from tests.peft_suite.__main__ import compare, read

PLAIN = {"a": "passed", "b": "passed", "c": "failed", "d": "skipped"}
COUNTS = Counter(fused=366, left_to_peft=44, launches=2000)
ENGINES = pytest.mark.parametrize("engine", ["reference", "triton"])


@ENGINES
def test_a_set_that_did_not_shrink(engine):
    assert compare(engine, PLAIN, PLAIN | {"c": "passed"}, COUNTS) == []


@ENGINES
@pytest.mark.parametrize("outcome", ["failed", "skipped"])
def test_a_set_that_did(engine, outcome):
    line = f"a passes on plain PEFT and {outcome} with the engine"
    assert compare(engine, PLAIN, PLAIN | {"a": outcome}, COUNTS) == [line]
    missing = {test: result for test, result in PLAIN.items() if test != "b"}
    assert compare(engine, PLAIN, missing, COUNTS) == ["b passes on plain PEFT and is missing with the engine"]


@ENGINES
def test_a_silent_fallback(engine):
    for counts in (Counter(), Counter(left_to_peft=410), Counter(fused=200, left_to_peft=210, launches=2000)):
        (line,) = compare(engine, PLAIN, PLAIN, counts)
        assert f"only {counts['fused']} calls were fused" in line


def test_kernels_that_were_not_launched():
    for launches in (0, 731):
        (line,) = compare("triton", PLAIN, PLAIN, Counter(fused=366, launches=launches))
        assert line == f"only {launches} kernels were launched for 366 fused calls"


def test_a_plain_run_in_which_nothing_passed():
    (line,) = compare("reference", {"a": "failed"}, {}, COUNTS)
    assert "nothing was compared" in line


def test_a_file_that_did_not_load(tmp_path):
    (tmp_path / "run.xml").write_text(
        '<testsuites><testsuite><testcase classname="" name="t.B"><error message="collection failure"/></testcase>'
        "</testsuite></testsuites>"
    )
    outcomes, _ = read(tmp_path / "run.xml")
    assert outcomes == {"t.B": "not loaded"}
    assert compare("reference", PLAIN | outcomes, PLAIN, COUNTS) == ["t.B did not load: its tests were not compared"]


def test_results_are_read(tmp_path):
    (tmp_path / "run.xml").write_text(
        """<testsuites><testsuite>
        <testcase classname="t.A" name="one"><properties><property name="fused" value="3"/></properties></testcase>
        <testcase classname="t.A" name="two"><failure/></testcase>
        <testcase classname="t.A" name="three"><skipped/></testcase>
        </testsuite></testsuites>"""
    )
    outcomes, counts = read(tmp_path / "run.xml")
    assert outcomes == {"t.A::one": "passed", "t.A::two": "failed", "t.A::three": "skipped"}
    assert counts == {"fused": 3, "tests with fused": 1}
