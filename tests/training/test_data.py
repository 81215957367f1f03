"""Reading, masking, order and padding of training rows."""

import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from training import demo
from training.data.order import IGNORED, rows_of_step, steps_per_epoch
from training.minimal.batches import collate, encode, read_jsonl, read_splits


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.BASE)


def test_prompt_is_masked_and_end_of_text_is_learned(tokenizer):
    row = {"prompt": "Input: two red mugs\nResponse:\n", "completion": "red mugs"}
    (example,) = encode([row], tokenizer, cutoff_len=64)
    targets = [label for label in example["labels"] if label != IGNORED]
    assert tokenizer.decode(example["input_ids"]) == row["prompt"] + row["completion"] + tokenizer.eos_token
    assert tokenizer.decode(targets) == row["completion"] + tokenizer.eos_token
    assert example["labels"][-1] == tokenizer.eos_token_id
    assert len(example["labels"]) == len(example["input_ids"])


def test_end_of_text_is_learned_when_it_also_pads():
    examples = [{"input_ids": [5, 6, 1], "labels": [IGNORED, 6, 1]}, {"input_ids": [7, 1], "labels": [7, 1]}]
    batch = collate(examples, pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 1], [7, 1, IGNORED]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_too_long_rows_are_named_not_cut(tokenizer):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a b c d e f", "completion": "g"}]
    with pytest.raises(ValueError, match=r"1 of 2 rows have more than cutoff_len = 4 tokens \(the first is row 2"):
        encode(rows, tokenizer, cutoff_len=4)


@pytest.mark.parametrize("rows, batch", [(12, 4), (13, 4), (3, 8), (1, 1)], ids=str)
def test_every_epoch_has_every_row_once(rows, batch):
    steps = steps_per_epoch(rows, batch)
    for epoch in range(3):
        seen = [row for step in range(steps) for row in rows_of_step(rows, batch, 7, epoch * steps + step)]
        assert sorted(seen) == list(range(rows))


def test_order_is_a_pure_function_of_seed_epoch_and_position():
    first = [rows_of_step(50, 8, 3, step) for step in range(20)]
    random.seed(99)
    torch.manual_seed(99)
    assert [rows_of_step(50, 8, 3, step) for step in reversed(range(20))] == first[::-1]
    assert first != [rows_of_step(50, 8, 4, step) for step in range(20)]
    assert first[:7] != first[7:14], "each epoch has its own order"


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a"', "line 2: not valid JSON"),
        ('["a", "b"]', r"line 2: expected the columns \['completion', 'prompt'\], got list"),
        ('{"text": "a"}', r"expected the columns \['completion', 'prompt'\], got \['text'\]"),
        ('{"prompt": "a", "completion": ""}', "`completion` must be a non-empty string, got ''"),
        ('{"prompt": 3, "completion": "a"}', "`prompt` must be a non-empty string, got 3"),
    ],
    ids=["json", "list", "columns", "empty", "type"],
)
def test_a_bad_row_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_jsonl(path)


def test_not_utf8_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9", "completion": "b"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl: not UTF-8"):
        read_jsonl(path)


def test_no_rows_and_no_file(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"train\.jsonl has no rows"):
        read_splits(tmp_path, seed=0)
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl does not exist"):
        read_splits(tmp_path / "absent.jsonl", seed=0)


def test_a_single_file_is_split_by_prompt(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{index % 40}", "completion": f"c{index}"} for index in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = read_splits(path, seed=0)
    prompts = {split: {row["prompt"] for row in splits[split]} for split in splits}
    assert len(prompts["test"]) == 4 and not prompts["test"] & prompts["train"]
    assert len(splits["train"]) + len(splits["test"]) == 100 and splits["validation"] == splits["test"]
    assert read_splits(path, seed=0) == splits != read_splits(path, seed=1)
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="2 different prompts are needed"):
        read_splits(path, seed=0)
