"""A run whose numbers are no longer finite: step, rows and layer are named, and the good checkpoints stay."""

import json
import re

import pytest
import torch
from transformers import AutoTokenizer

import dora_kernels as dk
from tests.support.interruptions import before_step
from tests.support.training_runs import arguments, demo_rows, write_rows
from training import demo
from training.__main__ import main
from training.checkpoints.checkpoint import list_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
ENGINES = pytest.mark.parametrize("engine", [[], ["--use_peft"]], ids=["ours", "peft"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", demo_rows(26))


def poisoned(kind, seen):
    def act(trainer, inputs):
        seen.append(inputs["input_ids"].clone())
        model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
        layer = model.model.layers[1].mlp.up_proj
        if kind == "weight":
            a = layer.lora_A if isinstance(layer, dk.DoraLinear) else layer.lora_A["default"].weight
            with torch.no_grad():
                a[0, 0] = torch.inf
        else:
            layer.magnitude.register_hook(lambda gradient: gradient * torch.nan)

    return act


@ENGINES
def test_a_nan_loss_names_step_rows_and_layer(data, tmp_path, monkeypatch, engine):
    seen = []
    before_step(monkeypatch, 3, poisoned("weight", seen))
    with pytest.raises(SystemExit) as error:
        main(arguments(data, tmp_path, *engine, save_step=1))
    message = str(error.value)
    assert re.search(
        r"the loss of step 3 \(.*\) is nan: .*model\.layers\.1\.mlp\.up_proj\S* was the first layer", message
    )
    assert re.search(r"the parameter \S*layers\.1\.mlp\.up_proj\S* holds NaN or infinity", message)
    # The rows that it names are those that were in the batch.
    numbers = [int(number) for number in re.findall(r"rows\.jsonl, row (\d+)", message)]
    named = [json.loads(line) for line in data.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    batch = [tokenizer.decode(row, skip_special_tokens=True) for row in seen[0]]
    assert [named[number - 1]["prompt"] + named[number - 1]["completion"] for number in numbers] == batch
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"], "the good ones stay"


def test_a_nan_gradient_stops_before_it_poisons_the_weights(data, tmp_path, monkeypatch):
    before_step(monkeypatch, 3, poisoned("gradient", []))
    with pytest.raises(SystemExit, match=r"gradient of step 3 \(rows.* finite: model\.layers\.1\.mlp\.up_proj\.mag"):
        main(arguments(data, tmp_path, save_step=1))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"]
