"""The minimal loop: groups, schedule, normalisation, and resuming bit for bit."""

import contextlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import dora_kernels as dk
from dora_kernels.layers.accumulating import norm_uses
from tests.tolerances import SAME_FP32
from training.checkpoints.checkpoint import list_checkpoints
from training.data.order import IGNORED
from training.minimal import loop
from training.minimal.evaluate import summed_loss
from training.minimal.loop import LoopSettings, parameter_groups, train

SETTINGS = LoopSettings(
    batch_size=2, gradient_accumulation_steps=2, max_steps=8, learning_rate=1e-2, eval_step=4, save_step=2, seed=3
)


def tiny_model(lora_dropout=0.1):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        eos_token_id=1,
        pad_token_id=0,
    )
    adapter = dk.DoraConfig(r=3, lora_alpha=6, lora_dropout=lora_dropout, impl="reference")
    return dk.apply_dora(LlamaForCausalLM(config), adapter)


def tiny_examples(count=21):
    """Rows of different lengths: a model that ends on 1 after repeating what it read."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for _ in range(count):
        ids = torch.randint(2, 32, (int(torch.randint(2, 6, (), generator=generator)),), generator=generator).tolist()
        examples.append({"input_ids": [*ids, *ids, 1], "labels": [IGNORED] * len(ids) + [*ids, 1]})
    return examples


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def run(output_dir, settings=SETTINGS, resume=False, model=None, stop_at=None, examples=None):
    """Train, or die just before the checkpoint of step `stop_at` is written. Returns the model and the metric rows."""
    model = model or tiny_model()

    def write_adapter(folder):
        if folder.name.startswith(f".tmp-{stop_at}-"):
            raise KeyboardInterrupt
        tensors = {name: parameter.detach() for name, parameter in trained(model).items()}
        save_file(tensors, folder / "adapter.safetensors")

    def read_adapter(folder):
        with torch.no_grad():
            for name, tensor in load_file(folder / "adapter.safetensors").items():
                trained(model)[name].copy_(tensor)

    examples = examples or tiny_examples()
    with contextlib.suppress(KeyboardInterrupt):
        train(
            model,
            examples,
            examples[:4],
            settings,
            output_dir=output_dir,
            pad_id=0,
            write_adapter=write_adapter,
            read_adapter=read_adapter,
            resume=resume,
        )
    return model, [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def test_magnitudes_have_their_own_group_without_decay():
    model = tiny_model()
    others, magnitudes = parameter_groups(model, weight_decay=0.1)
    expected = {id(parameter) for name, parameter in trained(model).items() if name.endswith("magnitude")}
    assert {id(parameter) for parameter in magnitudes["params"]} == expected and len(expected) == 7
    assert magnitudes["weight_decay"] == 0.0 and others["weight_decay"] == 0.1
    assert len(others["params"]) == 14 and not expected & {id(parameter) for parameter in others["params"]}


def test_a_bf16_magnitude_is_refused():
    with pytest.raises(ValueError, match=r"q_proj.magnitude must be torch.float32, got torch.bfloat16"):
        parameter_groups(tiny_model().bfloat16(), weight_decay=0.1)


def test_schedule_warms_up_then_follows_a_cosine(tmp_path):
    settings = LoopSettings(batch_size=2, max_steps=20, learning_rate=1e-2, warmup_ratio=0.2)
    _, rows = run(tmp_path, settings)
    rates = [row["learning_rate"] for row in rows]
    expected = [k / 4 if k < 4 else 0.5 * (1 + math.cos(math.pi * (k - 4) / 16)) for k in range(20)]
    assert rates == pytest.approx([1e-2 * factor for factor in expected])


def test_epochs_decide_the_steps_unless_max_steps_does(tmp_path):
    _, rows = run(tmp_path / "epochs", LoopSettings(batch_size=4, num_epochs=2))
    assert [row["step"] for row in rows] == list(range(1, 13))
    _, rows = run(tmp_path / "steps", LoopSettings(batch_size=4, num_epochs=2, max_steps=3))
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_accumulation_equals_one_large_batch(tmp_path):
    """Rows differ in length, so a mean of per-batch means would differ."""
    steps = {"max_steps": 4, "learning_rate": 1e-2}
    _, large = run(tmp_path / "large", LoopSettings(batch_size=6, **steps), model=tiny_model(lora_dropout=0.0))
    settings = LoopSettings(batch_size=2, gradient_accumulation_steps=3, **steps)
    _, small = run(tmp_path / "small", settings, model=tiny_model(lora_dropout=0.0))
    assert [row["tokens"] for row in large] == [row["tokens"] for row in small]
    assert [row["loss"] for row in small] == pytest.approx([row["loss"] for row in large], rel=SAME_FP32)


@pytest.mark.parametrize("keep_weights", [False, True], ids=["norms", "weights"])
def test_norms_are_kept_over_the_micro_steps(tmp_path, monkeypatch, keep_weights):
    kept = []

    def watched(model, batch):
        kept.append({use.kept_norm is not None for use in norm_uses(model)})
        assert all(use.keeps_weight == keep_weights for use in norm_uses(model))
        return summed_loss(model, batch)

    monkeypatch.setattr(loop, "summed_loss", watched)
    steps = {"batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2}
    run(tmp_path, LoopSettings(**steps, keep_weights=keep_weights))
    assert kept == [{False}, {True}, {True}] * 2


def test_loss_is_per_target_token(tmp_path):
    model, examples = tiny_model(), tiny_examples(4)
    _, rows = run(tmp_path, LoopSettings(batch_size=4, max_steps=1), model=model, examples=examples)
    assert rows[0]["tokens"] == sum(label != IGNORED for example in examples for label in example["labels"])


def test_evaluation_and_checkpoints_at_their_steps(tmp_path):
    _, rows = run(tmp_path)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 4, 8]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-6"]


@pytest.mark.parametrize("stop_at", [2, 4, 6, 8])
def test_resume_is_bit_identical(tmp_path, stop_at):
    """Dropout is on, so the random generator's state counts as well."""
    model, rows = run(tmp_path / "whole")
    _, partial = run(tmp_path / "broken", stop_at=stop_at)
    assert partial[-1]["step"] == stop_at
    torch.manual_seed(12345)
    resumed, resumed_rows = run(tmp_path / "broken", resume=True)
    assert resumed_rows == rows
    for name, parameter in trained(model).items():
        assert torch.equal(trained(resumed)[name], parameter), name


def test_resume_skips_a_damaged_checkpoint(tmp_path, capsys):
    _, rows = run(tmp_path / "whole")
    run(tmp_path / "broken", stop_at=6)
    file = tmp_path / "broken" / "checkpoint-4" / "training_state.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    _, resumed = run(tmp_path / "broken", resume=True)
    out = capsys.readouterr().out
    assert "skipping" in out and "checkpoint-4: training_state.safetensors has" in out
    assert "resuming from" in out and "checkpoint-2" in out
    assert resumed == rows


def test_resume_after_a_cut_metrics_line(tmp_path):
    _, rows = run(tmp_path / "whole")
    run(tmp_path / "broken", stop_at=6)
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert run(tmp_path / "broken", resume=True)[1] == rows


def test_resume_with_nothing_to_resume_starts_over(tmp_path, capsys):
    _, rows = run(tmp_path / "whole")
    _, resumed = run(tmp_path / "fresh", resume=True)
    assert "no sound checkpoint" in capsys.readouterr().out and resumed == rows


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    _, rows = run(tmp_path)
    assert run(tmp_path, resume=True)[1] == rows


def test_resume_with_other_settings_is_refused(tmp_path):
    run(tmp_path)
    other = LoopSettings(**{**SETTINGS.__dict__, "seed": 4, "learning_rate": 1.0})
    with pytest.raises(ValueError, match="other settings: learning_rate, seed differ"):
        run(tmp_path, other, resume=True)


def test_resume_with_other_data_is_refused(tmp_path):
    run(tmp_path)
    changed = tiny_examples()
    changed[5]["input_ids"][0] += 1
    with pytest.raises(ValueError, match="other settings: examples differ"):
        run(tmp_path, examples=changed, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.lora_A.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        run(tmp_path, model=model)


def test_learning_rate_zero_changes_nothing(tmp_path):
    before = {name: parameter.detach().clone() for name, parameter in trained(tiny_model()).items()}
    model, rows = run(tmp_path, LoopSettings(batch_size=4, max_steps=3, learning_rate=0.0))
    assert len(rows) == 3
    for name, parameter in trained(model).items():
        assert torch.equal(parameter, before[name]), name
