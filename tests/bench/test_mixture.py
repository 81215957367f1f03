"""A mixture's whole step: its gate closes, its tokens are spread evenly, and what is counted is what a model has."""

import argparse

import pytest
import torch
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from bench import model
from bench.__main__ import main
from bench.contestants import model as model_field
from bench.contestants.mixture import EvenRouter
from bench.counting.gpus import ROOFS, by_bytes_and_flops
from bench.counting.model_counts import at_depth, count_step
from bench.counting.predicted import predict_model
from bench.gates.model import Gate
from bench.measuring.shapes import MIXTURES, PRESETS, Run, model_flops
from bench.rows.session import Session
from dora_kernels.layers.experts import DoraExperts
from tests.support.oracle import relative_error
from tests.tolerances import SAME_FP32

BF16, HOPPER, CPU = torch.bfloat16, (9, 0), torch.device("cpu")
RUN = Run("tiny-moe", 0, 2, 8, 8)
OURS, LORA, CANNOT = "ours fp32, auto", "PEFT LoRA fp32", "PEFT DoRA fp32"


def session(path):
    arguments = {"device": "cpu", "preset": "tiny", "threads": 1, "repetitions": 1, "commit": None, "again": False}
    return Session(argparse.Namespace(**arguments, output=path / "r.jsonl", minutes=None))


def only(monkeypatch, *names):
    """Leaves these contestants."""
    every = model_field.mixture_contestants
    monkeypatch.setattr(
        model_field, "mixture_contestants", lambda *args: {n: c for n, c in every(*args).items() if n in names}
    )


def test_ours_and_pefts_lora_are_timed_and_what_peft_cannot_do_is_said(tmp_path):
    rows = model.measure(model_field.build_base(RUN, torch.float32, CPU), RUN, session(tmp_path))
    assert "ParamWrapper does not work with use_dora=True" in rows.pop(CANNOT)["failed"]
    assert len(rows) == 5 and not any(row["failed"] for row in rows.values()), rows
    assert all(row["seconds"]["total"]["median"] > 0 for row in rows.values())
    assert all(max(row["errors"].values()) < SAME_FP32 for row in rows.values())
    assert rows[LORA]["errors"].keys() == {"loss", "dA", "dB"} and rows[OURS]["errors"].keys() > {"dm"}
    case = RUN.case("fp32")
    assert case["tokens an expert"] == 2 * 8 * 2 / 4 and Run(**{name: case[name] for name in Run._fields}) == RUN


@pytest.mark.parametrize("change", ["scale", "no gradient"])
def test_one_stack_of_experts_that_is_wrong_fails_the_gate(change):
    gate, right = Gate(RUN, torch.float32, CPU), model_field.field_of(RUN, torch.float32)[OURS]

    def adapt(base):
        adapted = right.adapt(base)
        adapter = [m for m in adapted.modules() if isinstance(m, DoraExperts)][-1]
        if change == "scale":
            adapter.lora_alpha *= 1.1
        else:
            adapter.lora_B.requires_grad_(False)
        return adapted

    assert gate.broken(gate.errors(right)) is None
    assert "wrong" in gate.broken(gate.errors(right._replace(adapt=adapt)))


def test_the_gates_truth_has_every_stack_and_linear():
    """Two layers of four linears and two stacks, three gradients each, and the loss; of LoRA two."""
    gate, field = Gate(RUN, BF16, CPU), model_field.field_of(RUN, BF16)
    for name, gradients in (("frozen base", 0), ("PEFT LoRA bf16", 2), (OURS, 3)):
        errors = gate.errors(field[name])
        assert len(errors) == 1 + 2 * 6 * gradients and gate.broken(errors) is None


def test_tokens_are_spread_evenly_and_weighed_by_the_router():
    base = model_field.build_base(RUN, torch.float32, CPU)
    router = base.model.layers[1].mlp.gate
    assert isinstance(router, EvenRouter)
    own = Qwen3MoeTopKRouter(base.config)
    own.weight = router.weight
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    logits, weights, chosen = router(x)
    assert chosen.flatten().bincount(minlength=4).tolist() == [8] * 4
    scores = own(x)[0].softmax(dim=1).gather(1, chosen)
    assert torch.equal(logits, own(x)[0])
    assert relative_error(weights, scores / scores.sum(dim=1, keepdim=True)) <= SAME_FP32
    # As transformers' own weighs what it has chosen.
    with torch.no_grad():
        router.turns.copy_(own(x)[2])
    assert all(relative_error(a.double(), b.double()) <= SAME_FP32 for a, b in zip(router(x), own(x)))


@pytest.mark.slow
def test_two_depths_give_every_depth_of_a_mixture():
    contestant = model_field.field_of(RUN, BF16)[OURS]
    two, three, six = (count_step(RUN, contestant, BF16, HOPPER, layers) for layers in (2, 3, 6))
    for part, made in six.parts.items():
        for measure in (len, lambda some: sum(o.memory for o in some), lambda some: sum(o.flops for o in some)):
            assert at_depth(measure(two.parts[part]), measure(three.parts[part]), 6) == measure(made), part
    assert at_depth(two.frozen, three.frozen, 6) == six.frozen


@pytest.mark.slow
def test_a_mixture_is_predicted_beside_pefts_expert_lora(monkeypatch):
    """At a 30B's sizes: PEFT writes the stacks anew, and forms their gradients."""
    run = Run("qwen3-30b-a3b", 2, 1, 2048, 16, checkpointing=True)
    only(monkeypatch, "frozen base", "PEFT LoRA bf16", OURS, CANNOT)
    rows = predict_model(run, BF16, ROOFS["h200"], by_bytes_and_flops)
    assert "ParamWrapper" in rows.pop(CANNOT)["failed"] and not any("failed" in row for row in rows.values())
    seconds = {name: row["seconds"]["total"]["median"] for name, row in rows.items()}
    assert seconds["frozen base"] < seconds[OURS] < seconds["PEFT LoRA bf16"]
    weights = 2 * 128 * 3 * 2048 * 768 + 2 * 151936 * 2048
    assert rows["frozen base"]["frozen_bytes"] == pytest.approx(2 * weights, rel=0.05)


@pytest.mark.slow
def test_the_table_of_a_mixture_says_its_tokens_an_expert(monkeypatch, capsys):
    only(monkeypatch, OURS, CANNOT)
    words = ["--tables", "mixture", "--mixture", "tiny-moe", "--batch", "2", "--sequence", "8", "--ranks", "8"]
    assert main(["predict", "--gpu", "h200", *words, "--bytes-alone"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| ours fp32, auto") == 2 == printed.count("PEFT DoRA fp32 failed: ValueError")
    assert printed.count("model tiny-moe, batch 2, sequence 8, rank 8") == 2 == printed.count("tokens an expert 8.0")


def test_a_mixture_in_four_bits_is_refused(capsys):
    assert main(["model", "--device", "cpu", "--model", "tiny-moe", "--quantize", "nf4"]) == 2
    assert "--quantize nf4 does not go with --model tiny-moe" in capsys.readouterr().out
    with pytest.raises(ValueError, match="leaves its experts in 16 bits"):
        model_field.build_base(RUN._replace(quantize="nf4"), BF16, CPU)


def test_model_flops_are_those_of_a_tokens_own_experts():
    run = Run("tiny-moe", 0, 2, 8, 8)
    base, sizes = model_field.build_base(run, BF16, CPU), MIXTURES["tiny-moe"]
    linears = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear | EvenRouter))
    stacks = sum(p.numel() for p in base.parameters() if p.ndim == 3) * sizes.num_experts_per_tok // sizes.num_experts
    attention = 2 * 6 * run.sequence * sizes.queries
    assert model_flops(run) == 16 * (4 * (linears + stacks) + attention)


def test_a_day_measures_a_mixture():
    for preset in ("day", "h200", "rehearsal"):
        assert PRESETS[preset].mixtures and any(run.is_mixture for run in PRESETS[preset].runs), preset
