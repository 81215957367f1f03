"""Predictions for a GPU that is not here: what would not fit is said, and the committed tables are what comes out."""

import torch

from bench import model_field, predict
from bench.compare import group_table
from bench.gpus import CAPABILITIES, ROOFS
from bench.shapes import Run

BF16, HOPPER = torch.bfloat16, (9, 0)
H200 = ROOFS["h200"]


def test_what_exceeds_the_memory_would_not_fit():
    """With just the memory that ours needs, those that need more are rows without a time, and with their peak."""
    run = Run("tiny", 6, 2, 64, 4)
    base = model_field.build_base(run, BF16, torch.device("meta"))
    weights = sum(parameter.nbytes for parameter in base.parameters())
    ample = predict.predict_model(run, BF16, H200, HOPPER)
    assert not any("failed" in row for row in ample.values())
    # Beside the weights lie the batch's ids and the rotary frequencies.
    assert all(0 <= row["frozen_bytes"] - weights < 4096 for row in ample.values())
    ours = ample["ours fp32, auto"]
    memory = ours["frozen_bytes"] + ours["peak_bytes"]
    tight = predict.predict_model(run, BF16, H200._replace(memory=memory), HOPPER)
    more = {name for name, row in ample.items() if row["frozen_bytes"] + row["peak_bytes"] > memory}
    assert "PEFT DoRA fp32" in more and "ours fp32, auto" not in more and "frozen base" not in more
    assert {name for name, row in tight.items() if "seconds" not in row} == more
    assert all(tight[name]["peak_bytes"] == ample[name]["peak_bytes"] for name in more)
    lines = group_table(tight).splitlines()
    assert sum("PEFT DoRA fp32 failed: would not fit: 0.0 GiB of 0.0 GiB" in line for line in lines) == 1
    (row,) = (line for line in lines if line.startswith("| PEFT DoRA fp32  "))
    assert "FAILED" in row and f" {ample['PEFT DoRA fp32']['peak_bytes'] / 2**20:.1f} " in row


def test_every_gpu_has_its_data_sheets_memory():
    found = {name: roofs.memory / 1e9 for name, roofs in ROOFS.items()}
    assert found == {"h200": 141, "h100": 80, "a100": 80, "4090": 24, "b200": 180}
    assert CAPABILITIES.keys() == found.keys()
    held = {"seconds": {}, "frozen_bytes": 100_000_000_000}
    assert predict.fitting(held | {"peak_bytes": 41_000_000_000}, H200)["frozen_bytes"]
    row = predict.fitting(held | {"peak_bytes": 42_000_000_000}, H200)
    assert row == {"failed": "would not fit: 132.2 GiB of 131.3 GiB", "peak_bytes": 42_000_000_000}
