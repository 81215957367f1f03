"""Rows longer than the limit: cut there or left out, and said."""

import pytest

from tests.support.rows import load, tokenizer, write  # noqa: F401 (a fixture)

# ruff: noqa: F811 (the fixture's name)


def test_a_long_row_is_cut_at_the_limit_and_gets_no_new_end(tmp_path, tokenizer):
    texts = ["word " * 20, "word " * 2]
    rows = load(
        write(tmp_path / "a.jsonl", [{"text": text} for text in texts]), tokenizer, val_set_size=0, cutoff_len=9
    )
    whole = [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in texts]
    assert [row["input_ids"] for row in rows.train] == [whole[0][:9], whole[1]]
    assert [row["labels"] for row in rows.train] == [whole[0][:9], whole[1]]
    assert rows.cut == [{"place": "a.jsonl, row 1", "tokens": len(whole[0]), "kept": 9}] and not rows.skipped
    lost, total = len(whole[0]) - 9, len(whole[0]) + len(whole[1])
    assert f"1 of 2 rows have more than --cutoff_len 9 tokens and are cut there: {lost} of {total} tokens are lost" in (
        "\n".join(rows.said)
    )


@pytest.mark.parametrize("longer", [-1, 0, 1], ids=["shorter", "equal", "longer"])
def test_a_row_may_have_exactly_as_many_tokens_as_the_limit(tmp_path, tokenizer, longer):
    text = "two red mugs"
    length = len(tokenizer(text + tokenizer.eos_token)["input_ids"])
    path = write(tmp_path / "a.jsonl", [{"text": text}])
    rows = load(path, tokenizer, val_set_size=0, cutoff_len=length - longer)
    assert len(rows.train[0]["input_ids"]) == length - max(longer, 0)
    assert len(rows.cut) == (longer > 0)
    if longer <= 0:
        assert load(path, tokenizer, val_set_size=0, cutoff_len=length - longer, long_rows="drop").said == rows.said


def test_long_rows_can_be_left_out_and_are_not_bad_rows(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": "word " * count} for count in range(1, 21)])
    rows = load(path, tokenizer, val_set_size=0, cutoff_len=11, long_rows="drop", bad_row_limit=0)
    assert len(rows.train) == 5 and len(rows.skipped) == 15 and not rows.cut
    assert rows.skipped[0] == {"place": "a.jsonl, row 6", "reason": "too long: 13 tokens, more than --cutoff_len 11"}
    assert "15 of 20 rows are left out by --long_rows drop" in "\n".join(rows.said)
    assert rows.said[-1].endswith("; 15 rows left out")


def test_a_prompt_that_fills_the_limit_leaves_nothing_to_train_on(tmp_path, tokenizer):
    written = [{"prompt": "ask " * count, "completion": "answer"} for count in range(1, 11)]
    rows = load(write(tmp_path / "a.jsonl", written), tokenizer, val_set_size=0, cutoff_len=10, bad_row_limit=0)
    assert all(any(label >= 0 for label in row["labels"]) for row in rows.train)
    assert len(rows.train) + len(rows.skipped) == 10 and len(rows.skipped) > 3
    assert rows.skipped[-1]["place"] == "a.jsonl, row 10"
    assert rows.skipped[-1]["reason"].startswith("nothing to train on in the first 10 of ")
    assert f"{len(rows.skipped)} of 10 rows are left out, as no token of them would be trained" in "\n".join(rows.said)
    with pytest.raises(ValueError, match="has no usable training rows\n10 of 10 rows are left out"):
        load(write(tmp_path / "b.jsonl", [{"prompt": "ask " * 50, "completion": "b"}] * 10), tokenizer, cutoff_len=10)
