"""The judge of PEFT's suite: it must see a test that fails, one that vanishes, and layers that fell back to PEFT."""

from collections import Counter

from tests.peft_suite.__main__ import ROUNDED_APART, compare, read

PLAIN = {"a": "passed", "b": "passed", "c": "failed", "d": "skipped"} | dict.fromkeys(ROUNDED_APART, "passed")
FUSED = Counter(fused=366, left_to_peft=44)


def test_a_set_that_did_not_shrink():
    assert compare(PLAIN, PLAIN | {"c": "passed"} | dict.fromkeys(ROUNDED_APART, "failed"), FUSED) == []


def test_a_set_that_did():
    assert compare(PLAIN, PLAIN | {"a": "failed"}, FUSED) == ["a passes on plain PEFT and failed with the engine"]
    assert compare(PLAIN, PLAIN | {"a": "skipped"}, FUSED) == ["a passes on plain PEFT and skipped with the engine"]
    missing = {test: outcome for test, outcome in PLAIN.items() if test != "b"}
    assert compare(PLAIN, missing, FUSED) == ["b passes on plain PEFT and is missing with the engine"]


def test_a_silent_fallback():
    for counts in (Counter(), Counter(left_to_peft=410), Counter(fused=200, left_to_peft=210)):
        (line,) = compare(PLAIN, PLAIN, counts)
        assert f"only {counts['fused']} calls were fused" in line


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
