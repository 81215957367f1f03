"""The embedded model and data, and that a demo which does not learn says so."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training import demo
from training.__main__ import main
from training.demo.tasks import JSON_INSTRUCTION, base_row
from training.minimal.batches import SPLITS, read_splits
from training.minimal.build_demo import split_rows
from training.minimal.evaluate import answer, exact_match


@pytest.fixture(scope="module")
def splits():
    return read_splits(demo.DATA)


def test_it_is_small():
    files = [path for path in demo.BASE.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 5e6
    assert {path.suffix for path in files} <= {".py", ".json", ".jsonl", ".safetensors"}


def test_the_data_is_what_the_script_makes(splits):
    assert splits == split_rows()


def test_splits_share_no_prompt(splits):
    prompts = [row["prompt"] for split in SPLITS for row in splits[split]]
    assert len(set(prompts)) == len(prompts)


def test_the_answers_are_in_the_prompts(splits):
    for row in splits["test"]:
        fields = json.loads(row["completion"])
        assert set(fields) == {"item", "count", "name", "city", "day"}
        assert all(str(value) in row["prompt"] for value in fields.values())


def test_the_base_was_never_taught_the_task():
    rng = random.Random(0)
    rows = [base_row(rng) for _ in range(2000)]
    assert not any(JSON_INSTRUCTION in row["prompt"] or "{" in row["completion"] for row in rows)


def test_the_base_knows_what_it_was_taught():
    """So that the demo tunes a model that can do something, not noise."""
    model = AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    rng = random.Random(1)
    rows = [row for row in (base_row(rng) for _ in range(80)) if row["prompt"].startswith("Instruction: Give")]
    given = answer(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=40, batch_size=64)
    assert exact_match(given, rows) >= 0.4


@pytest.mark.slow
def test_a_demo_that_does_not_learn_exits_non_zero(tmp_path, capsys):
    flags = ["--learning_rate", "0", "--max_steps", "2", "--eval_step", "0", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"the demo did not learn: exact match went from 0\.0% to 0\.0%") as error:
        main(flags)
    assert error.value.code not in (0, None)
    assert "merged answers equal to the tuned model's: 200 of 200" in capsys.readouterr().out
