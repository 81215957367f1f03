"""Every row is accounted for: trained on, held out, cut or left out."""

import json
from types import SimpleNamespace

import pytest

from tests.support.rows import ROWS, load, tokenizer, write  # noqa: F401 (a fixture)
from training.finetune.output import write_account

# ruff: noqa: F811 (the fixture's name)


def test_every_row_is_in_the_account(tmp_path, tokenizer):
    """Of 60 rows: good, long, bad, nothing to train on, held out, and of a split that is not used."""
    train = [*ROWS[:20], *[{"prompt": "a", "completion": "word " * 40}] * 3, {"prompt": "", "completion": "a"}]
    train += [{"prompt": "word " * 40, "completion": "b"}] * 2
    write(tmp_path / "train.jsonl", train)
    write(tmp_path / "validation.jsonl", ROWS[20:30])
    write(tmp_path / "test.jsonl", ROWS[30:])
    rows = load(tmp_path, tokenizer, val_set_size=None, cutoff_len=16)
    assert len(train) == len(rows.train) + len(rows.skipped) == 26 and len(rows.skipped) == 3
    assert [row["place"] for row in rows.cut] == [f"train.jsonl, row {number}" for number in (21, 22, 23)]
    assert [row["place"] for row in rows.skipped] == [f"train.jsonl, row {number}" for number in (24, 25, 26)]
    assert rows.said[-1] == (
        "23 training rows; evaluated on the validation split of 10; 10 rows of the test split are not used; "
        "3 rows left out"
    )


def test_the_account_is_written_and_that_of_an_earlier_run_goes(tmp_path):
    skipped, cut = {"place": "a, row 1", "reason": "empty"}, {"place": "a, row 2", "tokens": 9, "kept": 5}
    for listed in (([skipped], [cut]), ([], [cut]), ([], [])):
        write_account(SimpleNamespace(skipped=listed[0], cut=listed[1]), tmp_path)
        for name, rows in zip(("skipped_rows.jsonl", "cut_rows.jsonl"), listed):
            assert (tmp_path / name).exists() == bool(rows)
            assert not rows or [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == rows


def test_columns_that_are_not_read_and_rows_seen_twice_are_said(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", [row | {"id": 1, "system": "s"} for row in ROWS])
    write(tmp_path / "test.jsonl", ROWS[:3])
    said = load(tmp_path, tokenizer, val_set_size=None).said
    assert "columns that are not read: id, system" in said
    assert any(line.startswith("3 of the rows to evaluate on are training rows too") for line in said)


def test_the_fingerprint_covers_every_row_of_both_sides(tmp_path, tokenizer):
    def fingerprint(train, validation):
        write(tmp_path / "train.jsonl", train)
        write(tmp_path / "validation.jsonl", validation)
        return load(tmp_path, tokenizer).fingerprint

    one = fingerprint(ROWS[:9], ROWS[9:12])
    assert one == fingerprint(ROWS[:9], ROWS[9:12])
    assert one != fingerprint(ROWS[:9], [*ROWS[9:11], ROWS[20]]), "a validation row has changed"
    assert one != fingerprint([*ROWS[:8], ROWS[20]], ROWS[9:12]), "a training row has changed"
    assert one != fingerprint(ROWS[:10], ROWS[10:12]), "a row has changed sides"


def test_no_rows_no_columns(tmp_path, tokenizer):
    """A file full of rows that cannot be read is not one without rows."""
    (tmp_path / "a.jsonl").write_text("half a row {\n" * 20)
    with pytest.raises(ValueError, match=r"20 of 20 rows cannot be used:\n  a\.jsonl, row 1 and 19 more: not valid"):
        load(tmp_path / "a.jsonl", tokenizer)
    with pytest.raises(ValueError, match="no usable training rows\n20 of 20 rows cannot be used"):
        load(tmp_path / "a.jsonl", tokenizer, bad_row_limit=1.0)
