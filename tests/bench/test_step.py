"""Training runs of `bench step`: the same start for all, curves that agree where they should, and their tables."""

import argparse

import pytest
import torch

from bench import step
from bench.__main__ import main
from tests.tolerances import SAME_FP32
from training.minimal.batches import read_splits


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    """Held-out losses are most of a short run's time, and not what is tested here."""
    monkeypatch.setattr(
        step.batches, "read_splits", lambda *args: {name: rows[:16] for name, rows in read_splits(*args).items()}
    )


def losses(name, dtype, steps=4):
    args = argparse.Namespace(steps=steps, rank=4, batch=4, device="cpu", dtype=dtype, rate=step.RATE)
    return step.losses(name, args, seed=3)["losses"]


def test_ours_learns_as_peft_does():
    """The same adapter, data and seed: the curves are PEFT's to fp32 noise, and not those of LoRA."""
    peft, ours, lora = (losses(name, "fp32") for name in ("PEFT DoRA", "ours", "PEFT LoRA"))
    assert ours == pytest.approx(peft, rel=SAME_FP32)
    assert lora != pytest.approx(peft, rel=1e-3)


@pytest.mark.slow
def test_bf16_learns_as_fp32_does():
    reference = losses(step.FP32_BASE, "bf16")
    assert reference != losses("PEFT DoRA", "fp32")  # its base was rounded to bf16
    curves = {name: losses(name, "bf16") for name in step.CONTESTANTS["bf16"][1:]}
    for curve in curves.values():
        # bf16 has 8 bits, and a mean over tokens is nearer than the unit in its last place.
        assert curve == pytest.approx(reference, rel=2**-8)
    ours = [tuple(curve) for name, curve in curves.items() if name.startswith("ours")]
    assert len(set(ours)) == 4  # each rounds in its own way


@pytest.mark.parametrize("name", step.CONTESTANTS["bf16"])
def test_all_begin_alike(name):
    """W and A are the reference's values, in the contestant's own dtypes."""
    reference = dict(step.adapters(step.adapted(step.FP32_BASE, "bf16", rank=4, seed=1)))
    found = dict(step.adapters(step.adapted(name, "bf16", rank=4, seed=1)))
    assert found.keys() == reference.keys() and len(found) == 14
    half = name == "PEFT DoRA, bf16 A and B"
    for path, (W, A, B) in found.items():
        assert W.dtype == (torch.float32 if name == step.FP32_BASE else torch.bfloat16)
        assert A.dtype == B.dtype == (torch.bfloat16 if half else torch.float32)
        assert torch.equal(W.float(), reference[path][0]) and not B.any()
        assert torch.equal(A, reference[path][1].to(A.dtype))


def test_tables_measure_from_the_reference():
    def run(held_out, **curves):
        rows = {name: {"failed": None, "losses": curve, "step_seconds": 0.1} for name, curve in curves.items()}
        return {name: row | {"held_out": [[4, held_out[name]]]} for name, row in rows.items()}

    names = {"reference": step.FP32_BASE, "ours": "ours, weight space"}
    runs = [
        {names[name]: row for name, row in run(held, **curves).items()}
        for held, curves in (
            ({"reference": 1.0, "ours": 1.01}, {"reference": [8, 4, 2, 1], "ours": [16, 4, 2, 1.1]}),
            ({"reference": 2.0, "ours": 2.06}, {"reference": [8, 4, 2, 1], "ours": [8, 4, 2.6, 1]}),
        )
    ]
    runs[0]["PEFT DoRA"], runs[1]["PEFT DoRA"] = {"failed": "no"}, {"failed": "no"}

    def cells(text, line):
        return [cell.strip() for cell in text.splitlines()[line].strip("|").split("|")]

    # Of the last half 0 and 10 %; at the first step 100 %.
    assert cells(step.curves_table(runs[0]), 3)[6:8] == ["5", "1e+02"]
    assert cells(step.curves_table(runs[0]), 4)[0] == "PEFT DoRA: no"
    # 1 and 3 % above; 5 and 15 % away.
    assert cells(step.summary_table(runs), 3) == [
        "ours, weight space", "1.5350 ± 0.7425", "2.00 ± 1.41", "10.000 ± 7.071", "2",
    ]  # fmt: skip
    assert cells(step.summary_table(runs), 4)[1:] == ["-", "-", "-", "0"]


def test_dtype_and_rate_are_part_of_the_case(tmp_path, capsys, monkeypatch):
    ran = []

    def losses(name, args, seed):
        ran.append((args.dtype, args.rate, seed, name))
        return {"failed": None, "losses": [2.0, 1.0], "held_out": [[2, 1.0]], "update": 0.1, "step_seconds": None}

    monkeypatch.setattr(step, "losses", losses)
    path = tmp_path / "step.jsonl"
    command = ["step", "--steps", "2", "--device", "cpu", "--output", str(path), "--commit", "test"]
    for more in ([], ["--rate", "1e-4"], ["--dtype", "bf16", "--seeds", "0", "1"]):
        assert main([*command, *more]) == 0
    assert ran == [
        *(("fp32", rate, 0, name) for rate in (step.RATE, 1e-4) for name in step.CONTESTANTS["fp32"]),
        *(("bf16", step.RATE, seed, name) for seed in (0, 1) for name in step.CONTESTANTS["bf16"]),
    ]
    # A second run measures nothing and shows both seeds, and no other case.
    ran.clear()
    capsys.readouterr()
    assert main([*command, "--dtype", "bf16", "--seeds", "0", "1"]) == 0
    assert not ran
    text = capsys.readouterr().out
    assert "2 seeds" in text and f"| {step.FP32_BASE} " in text and "LoRA" not in text


@pytest.mark.parametrize("name", ["PEFT DoRA", "ours"])
def test_the_update_is_measured_against_the_weight(name):
    model = step.adapted(name, "fp32", rank=4, seed=0)
    assert step.update(model) == 0
    for _, (W, A, B) in step.adapters(model):
        with torch.no_grad():
            A.copy_(W[:4])
            B.zero_()[0, 0] = 0.5  # s B A has W's first row, and nothing else
    found = [W for _, (W, _, _) in step.adapters(model)]
    expected = (sum(W[0].square().sum() for W in found) / sum(W.square().sum() for W in found)).sqrt()
    assert step.update(model) == pytest.approx(float(expected), rel=1e-5)
