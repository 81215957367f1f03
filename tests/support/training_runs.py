"""Runs of `python -m training` inside the test's process, on the demo's base and a few of its rows."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from training import demo
from training.__main__ import main

SMALL = {
    "base_model": demo.BASE,
    "batch_size": 2,
    "max_steps": 6,
    "save_step": 2,
    "eval_step": 3,
    "val_set_size": 10,
    "learning_rate": 5e-3,
    "lora_r": 2,
    "impl": "reference",
    "device": "cpu",
}


def demo_rows(count):
    lines = (demo.DATA / "train.jsonl").read_text().splitlines()[:count]
    return [json.loads(line) for line in lines]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The first rows of the demo's training data, as a user's single file."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", demo_rows(50))


def one_layer_base(folder, **sizes):
    """Writes a random Llama of one layer, with the demo's tokenizer, which trains in half the demo's time."""
    config = AutoConfig.from_pretrained(demo.BASE)
    config.update({"num_hidden_layers": 1} | sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.BASE).save_pretrained(folder)
    return folder


def arguments(data, output_dir, *bare, **flags):
    """Command-line words; a flag that is None is left out, `bare` ones are written as they are."""
    values = SMALL | {"data_path": data, "output_dir": output_dir} | flags
    words = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
    return [*words, *bare]


def run(data, output_dir, *bare, **flags):
    """Train, and return the rows of metrics.jsonl."""
    main(arguments(data, output_dir, *bare, **flags))
    return metrics(output_dir)


def metrics(output_dir):
    return [json.loads(line) for line in Path(output_dir, "metrics.jsonl").read_text().splitlines()]


def numbers(rows):
    """What must be the same in an equal run: everything but times and memory."""
    kept = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "num_tokens")
    return [{name: row[name] for name in kept if name in row} for row in rows]
