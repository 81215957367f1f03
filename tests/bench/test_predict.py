"""Predictions for a GPU that is not here: what would not fit is said, and the committed tables are what comes out."""

from functools import cache
from pathlib import Path

import pytest
import torch

from bench import predict
from bench.__main__ import main
from bench.contestants import model as model_field
from bench.counting import model_counts, predicted
from bench.counting.gpus import ROOFS, by_bytes_and_flops
from bench.counting.roofs import longest
from bench.counting.traffic import Operation
from bench.installation import RESULTS
from bench.measuring.shapes import Run
from bench.rows.compare import group_table

ROOT = Path(__file__).parents[2]
COMMITTED = RESULTS / "predict-h200.txt"
REWRITE = "if that is meant: python -m bench predict --gpu h200 --output bench/results/predict-h200.txt"
BF16 = torch.bfloat16
BASE, PEFTS, OURS = "frozen base", "PEFT DoRA fp32", "ours fp32, auto"
H200 = ROOFS["h200"]


def test_what_exceeds_the_memory_would_not_fit(monkeypatch):
    """With just the memory that ours needs, those that need more are rows without a time, and with their peak."""
    run = Run("tiny", 6, 2, 64, 4)
    three = {n: c for n, c in model_field.contestants(BF16, 4).items() if n in (BASE, PEFTS, OURS)}
    monkeypatch.setattr(model_field, "contestants", lambda dtype, rank, libraries: three)
    # What is counted does not depend on the GPU's memory.
    monkeypatch.setattr(model_counts, "count_step", cache(model_counts.count_step))
    base = model_field.build_base(run, BF16, torch.device("meta"))
    weights = sum(parameter.nbytes for parameter in base.parameters())
    ample = predicted.predict_model(run, BF16, H200, by_bytes_and_flops)
    assert not any("failed" in row for row in ample.values())
    # Beside the weights lie the batch's ids and the rotary frequencies.
    assert all(0 <= row["frozen_bytes"] - weights < 4096 for row in ample.values())
    ours = ample[OURS]
    memory = ours["frozen_bytes"] + ours["peak_bytes"]
    tight = predicted.predict_model(run, BF16, H200._replace(memory=memory), by_bytes_and_flops)
    more = {name for name, row in ample.items() if row["frozen_bytes"] + row["peak_bytes"] > memory}
    assert more == {PEFTS}
    assert {name for name, row in tight.items() if "seconds" not in row} == more
    assert all(tight[name]["peak_bytes"] == ample[name]["peak_bytes"] for name in more)
    lines = group_table(tight).splitlines()
    assert sum("PEFT DoRA fp32 failed: would not fit: 0.0 GiB of 0.0 GiB" in line for line in lines) == 1
    (row,) = (line for line in lines if line.startswith("| PEFT DoRA fp32  "))
    assert "FAILED" in row and f" {ample[PEFTS]['peak_bytes'] / 2**20:.1f} " in row


def test_every_gpu_has_its_data_sheets_memory():
    found = {name: roofs.memory / 2**30 for name, roofs in ROOFS.items()}
    assert found == {"h200": 141, "h100": 80, "a100": 80, "4090": 24, "b200": 180}
    layer = {"launches": {"forward": 1, "backward": 2}, "saved_bytes": 1 << 20}
    held = {"seconds": {}, "frozen_bytes": 100 << 30, "layer": layer}
    assert predicted.fitting(held | {"peak_bytes": 41 << 30}, H200)["frozen_bytes"]
    row = predicted.fitting(held | {"peak_bytes": 42 << 30}, H200)
    assert row == {"failed": "would not fit: 142.0 GiB of 141.0 GiB", "peak_bytes": 42 << 30, "layer": layer}


def test_the_committed_tables_are_of_the_versions_that_ci_installs():
    (line,) = (line for line in COMMITTED.read_text().splitlines() if line.startswith("Counted with "))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {each.partition(";")[0].strip() for each in lines}  # Triton's has a platform behind it
    for library in line.removeprefix("Counted with ").split(", "):
        assert library.replace(" ", "==") in required, REWRITE


def test_what_is_printed_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "check_compilable", lambda: True)
    monkeypatch.setattr(predict, "sections", lambda args: iter(["\nfirst", "\nsecond"]))
    path = tmp_path / "predicted.txt"
    command = ["predict", "--gpu", "h200"]
    assert main([*command, "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"{path.read_text()}\nwrote {path}\n"
    with pytest.raises(SystemExit):
        main([*command, "--output", str(path), "--measured", str(path)])


def test_a_prediction_that_failed_is_named_beside_what_was_measured():
    measured = {"total": {"median": 2e-3}}
    group = {"a": {"seconds": measured, "failed": None}, "b": {"failed": "out of memory"}}
    predicted = {"a": {"failed": "would not fit: 2.0 GiB of 1.0 GiB"}, "b": {"seconds": measured}}
    lines = predict.comparison(group, predicted).splitlines()
    assert lines[-2:] == ["a, predicted: would not fit: 2.0 GiB of 1.0 GiB", "b, measured: out of memory"]


def test_interpreted_kernels_have_no_time(capsys):
    assert main(["predict", "--gpu", "h200"]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        longest(Operation("weight_norm_kernel", 1, 1, 0, "bf16"), H200)


def test_seconds_of_ours_are_told_by_roof_and_the_ratios_are_marked():
    row = {"seconds": {"total": {"median": 6e-3}}, "roofs": {"memory": 1e-3, "alu": 5e-3}}
    assert list(predict.seconds_of_ours({"ours fp32, auto": row, "frozen base": row})) == [
        "ours fp32, auto, ms by roof: alu 5.00, memory 1.00"
    ]
    header, _, _ = group_table({"frozen base": row}, mark=predict.MARK).splitlines()
    assert "| × base* | × LoRA* |" in header and "by bytes and FLOPs alone" in predict.NOTES[longest]
    assert "*" not in group_table({"frozen base": row})


def test_both_floors_are_columns_and_a_layer_is_told_beside_the_step():
    layer = {"launches": {"forward": 53, "backward": 105}, "saved_bytes": 3 << 20}
    group = {
        name: {"seconds": {"total": {"median": t}}, "layer": layer}
        for name, t in (("frozen base", 4.0), ("frozen base, fused GLU", 2.0), ("ours fp32, auto", 5.0))
    } | {"PEFT DoRA fp32": {"failed": "would not fit", "layer": layer}, "lost": {"failed": "it raised"}}
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in group_table(group).splitlines()[:-2]
    )
    found = {row[0]: dict(zip(header, row)) for row in rows}
    # The fused floor is no frozen base to divide by, though it is the faster.
    assert [row["× base"] for row in found.values()] == ["1.00", "0.50", "1.25", "-", "-"]
    assert [row["× base, fused GLU"] for row in found.values()] == ["2.00", "1.00", "2.50", "-", "-"]
    assert [row["launches a layer"] for row in found.values()] == ["53+105"] * 4 + ["-"]
    assert [row["saved MiB a layer"] for row in found.values()] == ["3.0"] * 4 + ["-"]
    plain = group_table({"lost": {"failed": "it raised"}}).splitlines()[0]
    assert "fused GLU" not in plain and "a layer" not in plain
