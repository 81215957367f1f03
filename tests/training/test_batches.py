"""What reaches the model: the tokens that are learned, and rows that are packed."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.support.training_runs import data, demo_rows, numbers, run, write_rows  # noqa: F401
from tests.tolerances import AFTER_ADAM, SAME_FP32
from training import demo
from training.data.order import IGNORED
from training.finetune.trainer import DoraTrainer
from training.flags import Flags

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def batches(monkeypatch):
    """Every batch that is trained on, as it reaches the trainer's step."""
    seen = []
    step = DoraTrainer.training_step

    def recorded(self, model, inputs, *rest):
        seen.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(DoraTrainer, "training_step", recorded)
    return seen


def test_end_of_text_is_learned_though_it_pads(data, tmp_path, batches, capsys):  # noqa: F811
    model = tmp_path / "model"
    shutil.copytree(demo.BASE, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    run(data, tmp_path / "out", base_model=model, max_steps=3, batch_size=4, save_step=0)
    assert "the tokenizer has no pad token: <eos> pads" in capsys.readouterr().out
    eos = AutoTokenizer.from_pretrained(demo.BASE).eos_token_id
    assert any((batch["attention_mask"] == 0).any() for batch in batches), "there is padding"
    for labels in (row for batch in batches for row in batch["labels"]):
        targets = labels[labels != IGNORED]
        assert targets[-1] == eos and (targets == eos).sum() == 1


def test_only_the_assistant_is_learned(tmp_path, batches, capsys):
    rows = [
        {"messages": [{"role": "user", "content": "two red mugs"}, {"role": "assistant", "content": f"red {index}"}]}
        for index in range(12)
    ]
    run(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out", "--assistant_only_loss", val_set_size=2, max_steps=1)
    assert "no chat template" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for labels in batches[0]["labels"]:
        text = tokenizer.decode(labels[labels != IGNORED])
        assert text.startswith("red ") and text.endswith(tokenizer.eos_token) and "mugs" not in text


def test_packed_rows_do_not_see_each_other(tmp_path):
    """The loss of one step over the same rows, packed into one batch of fewer sequences and not."""
    path = write_rows(tmp_path / "a.jsonl", demo_rows(12))
    flags = {"val_set_size": 0, "max_steps": 1, "save_step": 0, "batch_size": 12, "cutoff_len": 256}
    (plain,) = run(path, tmp_path / "plain", **flags)
    (packed,) = run(path, tmp_path / "packed", "--packing", **flags)
    assert packed["loss"] == pytest.approx(plain["loss"], rel=SAME_FP32)


def test_packing(tmp_path, batches):
    rows = [{"text": row["prompt"] + row["completion"]} for row in demo_rows(30)]
    run(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out", "--packing", max_steps=1, save_step=0, cutoff_len=256)
    eos = AutoTokenizer.from_pretrained(demo.BASE).eos_token_id
    assert (batches[0]["input_ids"] == eos).sum() > 2, "two sequences hold more than two rows"
    assert (batches[0]["position_ids"] == 0).sum() == (batches[0]["input_ids"] == eos).sum(), "each row starts at 0"


def test_the_fused_loss_is_the_models_own_and_counts_as_many_tokens(data, tmp_path, monkeypatch):  # noqa: F811
    """With `--use_liger` the model computes its loss itself. Liger needs a GPU; here the model's own stands for it, and
    trains as TRL's head does."""
    fused = []
    monkeypatch.setattr("training.finetune.run.use_fused_loss", fused.append)
    monkeypatch.setattr(Flags, "check", lambda flags: None)
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM,
        "forward",
        lambda self, *args, **inputs: fused.append("labels" in inputs) or forward(self, *args, **inputs),
    )
    plain = numbers(run(data, tmp_path / "plain", eval_step=0, max_steps=4, save_step=0))
    assert not any(fused)
    own = numbers(run(data, tmp_path / "own", "--use_liger", eval_step=0, max_steps=4, save_step=0))
    assert any(isinstance(one, LlamaForCausalLM) for one in fused) and fused.count(True) == 4
    for ours, trls in zip(own, plain, strict=True):
        assert ours == pytest.approx(trls, rel=AFTER_ADAM)
