"""Reading, masking, order and padding of training rows."""

import random

import pytest
import torch
from transformers import AutoTokenizer

from training import demo
from training.data.order import IGNORED, rows_of_step, steps_per_epoch
from training.minimal.batches import collate, encode, read_splits


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


def write_splits(folder, **texts):
    row = '{"prompt": "a", "completion": "b"}\n'
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(texts.get(split, row))
    return folder


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a"', "not valid JSON"),
        ('["a", "b"]', "expected an object with columns, got list"),
        ('{"text": "a"}', "`prompt` is missing"),
        ('{"prompt": "a", "completion": ""}', "`completion` is empty"),
    ],
    ids=["json", "list", "columns", "empty"],
)
def test_the_minimal_loop_names_a_bad_row(tmp_path, line, message):
    good = '{"prompt": "a", "completion": "b"}\n'
    assert read_splits(write_splits(tmp_path))["train"] == [{"prompt": "a", "completion": "b"}]
    with pytest.raises(ValueError, match=rf"test\.jsonl, row 2: {message}"):
        read_splits(write_splits(tmp_path, test=good + line + "\n"))


def test_the_minimal_loop_needs_every_split(tmp_path):
    with pytest.raises(ValueError, match="has no validation rows; expected the splits train, validation, test"):
        read_splits(write_splits(tmp_path, validation="\n"))
