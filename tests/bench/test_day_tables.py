"""What a day makes of its rows: predictions held to profiles, constants proposed, tests joined, the report."""

import ast
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import kernels, questions, roofs
from bench.counting.gpus import ROOFS, by_bytes_and_flops
from bench.counting.roofs import longest
from bench.counting.traffic import Operation
from bench.day import gpu_tests, predicted, report, thresholds
from bench.day.folder import TESTS, Folder
from bench.day.predicted import Compared

ROOT = Path(__file__).parents[2]
H200 = ROOFS["h200"]


@pytest.mark.parametrize(
    ("operation", "roof"),
    [
        (Operation("mm", 10**9, 0, 10**6, "bf16"), "memory"),
        (Operation("mm", 10**6, 0, 10**12, "tf32x3"), "tensor, tf32x3"),
        (Operation("mm", 10, 0, 10, "bf16"), "launch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_prediction_names_its_roof(operation, roof):
    for limit in (by_bytes_and_flops, longest):
        found, seconds = predicted.predict(operation, H200, limit)
        assert found == roof and seconds == limit(operation, H200)[1]


def compared(roof, *ratios):
    return [Compared("case", "merge", "merge_scale_kernel", 1e-4, ratio * 1e-4, roof) for ratio in ratios]


def test_roofs_that_are_off_get_another_rate():
    found = [*compared("memory", 1.3, 1.5, 1.4), *compared("tensor, tf32x3", 1.1, 0.9), *compared("launch", 2.0)]
    found += compared("issue", 1.3)
    wrong = predicted.corrections(found, H200)
    assert set(wrong) == {"memory", "launch", "issue"}
    assert wrong["memory"].proposed == pytest.approx(H200.bandwidth / 1.4) and wrong["memory"].launches == 3
    assert wrong["launch"].proposed == pytest.approx(2 * H200.launch)
    assert wrong["issue"].proposed == pytest.approx(H200.clock / 1.3)
    text = predicted.section(found, H200, longest)
    assert text.startswith("2 of 7 launches are within 15%") and text.count("merge: merge_scale_kernel") == 5


@pytest.mark.parametrize(("ratio", "off"), [(1.14, False), (1.16, True), (0.88, False), (0.86, True)])
def test_fifteen_percent_either_way_is_off(ratio, off):
    (one,) = compared("memory", ratio)
    assert one.off is off


def test_our_launches_are_found_among_a_librarys():
    ours = Operation("rescale_bwd_kernel", 1, 1, 1, "bf16")
    library = Operation("mm", 1, 1, 1, "bf16")
    profile = [("_rescale_bwd_kernel", 1.0), ("nvjet_tst_64x8", 2.0), ("splitKreduce", 3.0)]
    assert list(predicted.matched([ours, library], profile)) == [(ours, 1.0)]
    assert list(predicted.matched([ours, library], profile[:2])) == [(ours, 1.0), (library, 2.0)]
    assert not list(predicted.matched([library, library], profile))


def forms(tokens, token, weight):
    case = {"question": questions.FORMS, "out": 4096, "in": 4096, "tokens": tokens, "rank": 16, "dtype": "bf16"}
    case["bias"] = False
    rows = {"frozen base": 1.0, "ours fp32, token, triton": token, "ours fp32, weight, triton": weight}
    stamp = {"kind": "GPU", "device": "d", "threads": None}
    return {
        name: {"command": "questions", "case": case, "stamp": stamp, "seconds": {"total": {"median": time}}}
        for name, time in rows.items()
    }


def test_the_factor_is_the_one_whose_choices_lose_least():
    """Weight space is chosen from 2048 tokens on by the prediction; measured, only from 8192 on."""
    measured = [forms(2048, 1.0, 1.3), forms(4096, 1.0, 1.1), forms(8192, 1.2, 1.0), forms(16384, 1.5, 1.0)]
    found = thresholds.weight_space_factor(list(thresholds.timed(measured)), (9, 0))
    assert found["today"] == 1.0 and found["cases"] == 4
    assert found["loses"] == 0 < found["loses_today"]
    assert found["proposed"] > 1
    as_predicted = [forms(512, 1.0, 1.3), forms(16384, 1.5, 1.0)]
    assert thresholds.weight_space_factor(list(thresholds.timed(as_predicted)), (9, 0))["proposed"] == 1.0
    assert thresholds.weight_space_factor([], (9, 0)) is None


def test_the_other_constants_come_from_rates():
    total = {"seconds": {"total": {"median": 1e-3}}}
    case = {"rank": 384, "dtype": "bf16"}
    copy = {"command": "kernels", "case": case, "memory_bytes": 4 * 10**9, **total}
    merge = {"command": "kernels", "case": case, "launches": [], "flops": {"bf16x3": 10**11}, **total}
    group = {kernels.COPY: copy, "merge": merge, "weight_norm": merge | {"flops": {"tf32x3": 2 * 10**11}}}
    assert thresholds.rank_per_byte([group])["proposed"] == pytest.approx((12.5 + 25) / 2)
    launch = {"command": "roofs", "case": {}, "seconds": {"total": {"median": 3e-6 * roofs.IN_A_ROW}}}
    found = thresholds.shortest_launch([{kernels.COPY: copy, roofs.LAUNCH: launch}])
    assert found["proposed"] == pytest.approx(6e6)
    assert thresholds.rank_per_byte([]) is None and thresholds.shortest_launch([]) is None


def test_a_measured_roof_replaces_an_assumed_one():
    total = {"seconds": {"total": {"median": 1e-3}}}
    group = {kernels.COPY: {"memory_bytes": 3 * 10**9, **total}, roofs.TF32: {"flops": {"tf32": 3 * 10**11}, **total}}
    group[kernels.GEMM] = {"flops": {"bf16": 6 * 10**11}, **total}
    found = roofs.measured_roofs(group, H200)
    assert found.bandwidth == pytest.approx(3e12) and found.flops["tf32x3"] == pytest.approx(1e14)
    assert found.flops["bf16"] == pytest.approx(6e14) and found.flops["bf16x3"] == pytest.approx(2e14)
    assert found.flops["fp32"] == H200.flops["fp32"] and found.launch == H200.launch


def suite(**outcomes):
    found = ET.Element("testsuite")
    for name, tag in outcomes.items():
        case = ET.SubElement(found, "testcase", file="tests/a.py", name=name)
        if tag:
            ET.SubElement(case, tag)
    return found


def test_results_of_a_cut_file_are_joined(tmp_path):
    first = suite(passes=None, fails="failure", later="error", skips="skipped")
    assert gpu_tests.passed_of(first) == ["tests/a.py::passes"]
    both = gpu_tests.joined(first, suite(fails="failure", later=None))
    assert gpu_tests.count(both) == {"passed": 2, "failed": 1, "skipped": 1}
    folder = Folder(tmp_path)
    gpu_tests.write(folder, {"tests/a.py": both})
    (read,) = ET.parse(tmp_path / TESTS).getroot()
    assert (read.get("name"), read.get("tests"), read.get("failures")) == ("tests/a.py", "4", "1")
    assert "- tests/a.py::fails" in report.tests(folder)


def test_every_file_with_tests_of_a_gpu_is_run():
    def has(path):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        marked = any(isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.gpu" for node in nodes)
        tests = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        # The fixture of this name, not a parameter.
        return marked or any(
            "device" in [argument.arg for argument in node.args.args]
            and not any(re.search(r"'device\b", ast.unparse(decorator)) for decorator in node.decorator_list)
            for node in tests
        )

    found = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if has(path)}
    assert found == set(gpu_tests.FILES)


def test_a_file_that_is_cut_leaves_what_it_ran(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests, "REHEARSED", {})
    declared = "def pytest_configure(config):\n    config.addinivalue_line('markers', 'gpu: of a GPU')\n"
    (tmp_path / "conftest.py").write_text(declared)
    (tmp_path / "test_a.py").write_text(
        "import os, signal, pytest\npytestmark = pytest.mark.gpu\ndef test_passes(): pass\n"
        "def test_takes_too_long(): os.kill(os.getpid(), signal.SIGINT)\n"
    )
    found, ended = gpu_tests.run_file("test_a.py", False, [], 600)
    assert not ended and gpu_tests.passed_of(found) == ["test_a.py::test_passes"]


def model_row(time, **more):
    case = {"model": "llama-3-8b", "layers": 0, "batch": 2, "sequence": 4096, "rank": 16}
    case |= {"checkpointing": False, "quantize": "", "dtype": "bf16", "compiled": False}
    total = {"median": time, "low": 0.99 * time, "high": 1.01 * time}
    stamp = {"kind": "GPU", "device": "H100", "threads": None, "commit": "abc"}
    return {"command": "model", "case": case, "stamp": stamp, "seconds": {"total": total}, **more}


def test_the_headline_has_the_fields_columns():
    held = {"peak_bytes": 60 << 30, "frozen_bytes": 15 << 30}
    out_of_memory = model_row(1.0) | {"seconds": {}, "failed": "out of memory"}
    text = report.headline([{"ours fp32, auto": model_row(0.6, **held), "PEFT DoRA fp32": out_of_memory}])
    ours, peft, published = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:5])
    assert ours == [
        "ours fp32, auto, r = 16",
        "H100",
        "2 × 4096",
        "1",
        "0.600 ± 1 %",
        "454",
        "13653",
        "1.09",
        "75.0",
        "abc",
    ]
    assert "failed: out of memory" in peft
    assert published[6] == "12473"


def test_what_is_not_to_be_believed_is_in_the_report():
    stamp = {"device": "d"}

    def row(time, **more):
        total = {"median": time, "low": time, "high": time}
        return {"command": "kernels", "case": {"tokens": 8}, "stamp": stamp, "seconds": {"total": total},
                "memory_bytes": 100, **more}  # fmt: skip

    found = {kernels.COPY: row(1.0), "merge": row(0.5), "weight_norm": row(2.0), "cast": row(1.0, failed="wrong")}
    text = report.doubts([found])
    assert "merge: more bytes a second" in text and "cast: wrong" in text and "weight_norm" not in text
