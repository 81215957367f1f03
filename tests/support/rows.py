"""A user's data in files of every format, and the rows that are read from it."""

import json

import datasets
import pytest
from transformers import AutoTokenizer

from training import demo
from training.data.rows import load_rows

ROWS = [{"prompt": f"ask {index}", "completion": f"answer {index}"} for index in range(40)]
TEXTS = ("prompt", "completion", "text", "messages")
MESSAGES = [{"role": "user", "content": "two red mugs"}, {"role": "assistant", "content": "red mugs"}]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.BASE)


def load(path, tokenizer, **options):
    settings = {"cutoff_len": 64, "val_set_size": 4, "bad_row_limit": 0.5, "seed": 0}
    return load_rows(str(path), tokenizer, **settings | options)


def write(path, rows):
    """Rows in the format that the suffix names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(row["text"] + "\n" for row in rows))
    return path


def contents(dataset):
    """The rows as they stood in the data: without their tokens, their place and columns of other kinds."""
    return [{name: row[name] for name in TEXTS if row.get(name) is not None} for row in dataset]
