"""The minimal loop's data, .jsonl rows with `prompt` and `completion`, as batches; and the order of rows everywhere."""

import hashlib
import json
import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..data.order import IGNORED

COLUMNS = {"prompt", "completion"}
SPLITS = ("train", "validation", "test")

Row = dict[str, str]
Example = dict[str, list[int]]


def read_splits(data_path: str | Path, seed: int) -> dict[str, list[Row]]:
    """Train, validation and test rows of a folder with one .jsonl file each, or of a single .jsonl file.

    From a single file a tenth of the rows (at least one), drawn by `seed`, is held out as validation and test alike;
    rows with the same prompt stay on one side. Raises ValueError or FileNotFoundError naming the file and the row.
    """
    path = Path(data_path)
    if path.is_dir():
        return {split: read_jsonl(path / f"{split}.jsonl") for split in SPLITS}
    rows = read_jsonl(path)
    prompts = sorted({row["prompt"] for row in rows})
    if len(prompts) < 2:
        raise ValueError(f"{path}: 2 different prompts are needed, to train and to evaluate, got {len(prompts)}")
    held_out = set(random.Random(seed).sample(prompts, max(1, len(prompts) // 10)))
    evaluation = [row for row in rows if row["prompt"] in held_out]
    return {
        "train": [row for row in rows if row["prompt"] not in held_out],
        "validation": evaluation,
        "test": evaluation,
    }


def read_jsonl(path: Path) -> list[Row]:
    """The rows of one file. Read line by line, without a data library, so that an error can name the line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a .jsonl file with the columns {sorted(COLUMNS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict) or set(row) != COLUMNS:
            got = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{path}, line {number}: expected the columns {sorted(COLUMNS)}, got {got}")
        for name, value in row.items():
            if not isinstance(value, str) or not value:
                raise ValueError(f"{path}, line {number}: `{name}` must be a non-empty string, got {value!r}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def encode(rows: list[Row], tokenizer: PreTrainedTokenizerBase, cutoff_len: int) -> list[Example]:
    """Token ids and labels. Labels are the ids with the prompt's replaced by `IGNORED`; the end-of-text token that
    closes every completion is a label like any other, so the model learns to stop.

    Raises ValueError if a row has more than `cutoff_len` tokens: cutting it would cut the end-of-text off.
    """
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in rows], add_special_tokens=False)["input_ids"]
    examples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        completion = [*completion, tokenizer.eos_token_id]
        examples.append({"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion})
    lengths = [len(example["input_ids"]) for example in examples]
    too_long = [number for number, length in enumerate(lengths, 1) if length > cutoff_len]
    if too_long:
        raise ValueError(
            f"{len(too_long)} of {len(rows)} rows have more than cutoff_len = {cutoff_len} tokens "
            f"(the first is row {too_long[0]}, the longest has {max(lengths)}); raise --cutoff_len or shorten them"
        )
    return examples


def fingerprint(examples: list[Example]) -> str:
    """The sha256 of all token ids and labels, by which a resumed run knows its data."""
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()


def collate(examples: list[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each int64 [batch, longest], padded on the right.

    Padding is known by length, not by value: a tokenizer whose pad token is its end-of-text still learns to stop.
    """
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([example[name] + [value] * (longest - len(example[name])) for example in examples])

    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    return {
        "input_ids": padded("input_ids", pad_id),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "labels": padded("labels", IGNORED),
    }
