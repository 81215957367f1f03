"""The minimal loop's data: rows with `prompt` and `completion` as batches of token ids."""

import hashlib
import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..data.kinds import problem_of
from ..data.order import IGNORED
from ..data.sources import read_source

SPLITS = ("train", "validation", "test")

Row = dict[str, str]
Example = dict[str, list[int]]


def read_splits(folder: str | Path) -> dict[str, list[Row]]:
    """Train, validation and test rows of a folder. Each row has `prompt` and `completion`.

    Raises:
        ValueError: a split is missing, or a row cannot be used; the message names the file and the row.
    """
    splits = read_source(str(folder)).splits
    if missing := [split for split in SPLITS if not splits.get(split)]:
        raise ValueError(f"{folder} has no {missing[0]} rows; expected the splits {', '.join(SPLITS)}")
    for row in (row for rows in splits.values() for row in rows):
        if problem := row.problem or problem_of(row.values, "prompt + completion"):
            raise ValueError(f"{folder}: {row.place}: {problem}")
    return {split: [row.values for row in rows] for split, rows in splits.items()}


def encode(rows: list[Row], tokenizer: PreTrainedTokenizerBase, cutoff_len: int) -> list[Example]:
    """Token ids and labels of each row. Labels are the token ids, with `IGNORED` in place of the prompt's.

    Every completion ends in the end-of-text token, whose label is not ignored: the model learns to stop.

    Raises:
        ValueError: a row has more than `cutoff_len` tokens. A cut row would lose its end-of-text token.
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
    """The sha256 of all token ids and labels. A resumed run compares it with its own."""
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()


def collate(examples: list[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each int64 [batch, longest], padded on the right.

    The mask follows from the lengths. So an end-of-text token is learned even where it is the pad token too.
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
