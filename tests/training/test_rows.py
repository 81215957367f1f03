"""Reading, detecting, checking and splitting the rows of a user's data."""

import datasets
import numpy as np
import pytest

from tests.support.rows import MESSAGES, ROWS, contents, load, tokenizer, write  # noqa: F401 (a fixture)
from training.data.holdout import hold_out
from training.data.kinds import Content
from training.data.tokens import CHAT_TEMPLATE, Row, Tokens

# ruff: noqa: F811 (the fixture's name)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, tokenizer, suffix):
    rows = load(write(tmp_path / f"rows{suffix}", ROWS), tokenizer)
    assert rows.kind == "prompt + completion" and not rows.skipped
    assert len(rows.train) == 36 and len(rows.validation) == 4
    assert sorted(map(str, contents(rows.train) + contents(rows.validation))) == sorted(map(str, ROWS))
    assert {row["place"] for row in rows.train} <= {f"rows{suffix}, row {number}" for number in range(1, 41)}


def test_a_text_file_is_a_row_per_line(tmp_path, tokenizer):
    rows = load(write(tmp_path / "rows.txt", [{"text": f"line {index}"} for index in range(20)]), tokenizer)
    assert rows.kind == "text" and len(rows.train) == 16
    assert "column text" in rows.said[0]


def test_instructions_become_prompts(tmp_path, tokenizer):
    written = [{"instruction": "Add.", "input": f"1 + {index}", "output": f"{index + 1}"} for index in range(5)]
    rows = load(
        write(tmp_path / "a.json", [*written, {"instruction": "Go.", "output": "ok"}]), tokenizer, val_set_size=0
    )
    first, *_, last = contents(rows.train)
    assert (
        first["prompt"] == "### Instruction:\nAdd.\n\n### Input:\n1 + 0\n\n### Response:\n"
        and first["completion"] == "1"
    )
    assert last == {"prompt": "### Instruction:\nGo.\n\n### Response:\n", "completion": "ok"}
    assert rows.validation is None


def test_a_missing_chat_template_is_supplied_out_loud(tmp_path, tokenizer):
    rows = load(write(tmp_path / "a.jsonl", [{"messages": MESSAGES}] * 8), tokenizer, val_set_size=0)
    assert rows.kind == "messages" and "no chat template" in rows.said[1]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text == f"User:\ntwo red mugs\nAssistant:\nred mugs{tokenizer.eos_token}\n"


def test_a_template_that_is_there_stays(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] }}: {{ messages[1]['content'] + eos_token }}"
    path = write(tmp_path / "a.jsonl", [{"messages": MESSAGES}] * 8)
    assert not any("chat template" in line for line in load(path, tokenizer).said)


def test_a_template_that_ends_in_its_own_way_is_said(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] }} {{ messages[1]['content'] }}<end>"
    path = write(tmp_path / "a.jsonl", [{"messages": MESSAGES}] * 8)
    assert "ends an answer with '<end>', not with the end-of-text '<eos>'" in load(path, tokenizer).said[1]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"prompt": "a"', "not valid JSON"),
        (b'["a", "b"]', "expected an object with columns, got list"),
        (b'{"prompt": "a", "other": "b"}', "`completion` is missing"),
        (b'{"prompt": "a", "completion": " "}', "`completion` is empty"),
        (b'{"prompt": 3, "completion": "a"}', "`prompt` should be text, got int"),
        (b'{"prompt": "caf\xe9", "completion": "b"}', "`prompt` is not UTF-8"),
        (b'\xff\xfe{"prompt": "a", "completion": "b"}', "not UTF-8"),
    ],
    ids=["json", "list", "columns", "empty", "type", "utf-8", "utf-16 mark"],
)
def test_a_bad_row_is_named_and_left_out(tmp_path, tokenizer, line, reason):
    path = write(tmp_path / "rows.jsonl", ROWS)
    path.write_bytes(line + b"\n" + path.read_bytes())
    rows = load(path, tokenizer)
    (skipped,) = rows.skipped
    assert skipped["place"] == "rows.jsonl, row 1" and skipped["reason"].startswith(reason)
    assert f"1 of 41 rows cannot be used:\n  {skipped['place']}: {reason}" in "\n".join(rows.said)
    assert sorted(map(str, contents(rows.train) + contents(rows.validation))) == sorted(map(str, ROWS))


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([], "`messages` is empty"),
        ("hello", "`messages` should be a list of messages, got str"),
        ([{"content": "a"}], "`messages` should hold messages with `role` and `content`, or `from` and `value`"),
        ([{"role": "user", "content": None}], "`messages` has a `content` that should be text, got NoneType"),
    ],
    ids=["empty", "text", "role", "content"],
)
def test_a_bad_conversation_is_named(tmp_path, tokenizer, messages, reason):
    path = write(tmp_path / "a.jsonl", [{"messages": MESSAGES}] * 5 + [{"messages": messages}])
    assert load(path, tokenizer, val_set_size=0).skipped == [{"place": "a.jsonl, row 6", "reason": reason}]


def test_too_many_bad_rows_stop_the_run(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [*ROWS, *[{"prompt": "", "completion": "a"}] * 20])
    assert len(load(path, tokenizer, bad_row_limit=1 / 3).skipped) == 20
    with pytest.raises(ValueError, match="20 of 60 rows cannot be used") as error:
        load(path, tokenizer, bad_row_limit=0.33)
    assert "20 of 60 rows cannot be used:\n  rows.jsonl, row 41 and 19 more: `prompt` is empty\n" in str(error.value)
    assert "row 42" not in str(error.value) and "--bad_row_limit 0.33" in str(error.value)


def test_the_datas_own_split_wins(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.csv", ROWS[:3])
    rows = load(tmp_path, tokenizer)
    assert len(rows.train) == 40 and contents(rows.validation) == ROWS[:3]
    assert "evaluated on the test split of 3; --val_set_size 4 is not used" in rows.said[-1]
    write(tmp_path / "validation.json", ROWS[:2])
    assert len(load(tmp_path, tokenizer).validation) == 2, "validation before test"


def test_a_hub_id_and_its_splits(tokenizer, monkeypatch):
    """The other use that the reference documents: column `text`, splits train and test."""

    def load_dataset(name):
        assert name == "timdettmers/openassistant-guanaco"
        rows = [{"text": f"### Human: {index}### Assistant: {index}"} for index in range(12)]
        split = datasets.Dataset.from_list
        return datasets.DatasetDict({"train": split(rows[:9]), "test": split(rows[9:])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load("timdettmers/openassistant-guanaco", tokenizer, val_set_size=None)
    assert (len(rows.train), len(rows.validation), rows.kind) == (9, 3, "text")


def test_a_hub_that_does_not_answer_is_named(tokenizer, monkeypatch):
    def load_dataset(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"`--data_path` a/b is neither here nor readable from the hub: .* no route"):
        load("a/b", tokenizer)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", "", "has no rows"),
        (
            "a.jsonl",
            '{"frage": "a", "antwort": "b"}',
            r"has the columns \['antwort', 'frage'\]; expected messages.*; --columns ",
        ),
        ("a.json", "{", "is not valid JSON"),
        ("a.json", "3", "should hold an array of rows, or one row a line, got int"),
        ("a.xml", "<a/>", r"should end in one of \.jsonl"),
    ],
    ids=["no rows", "columns", "json", "array", "suffix"],
)
def test_data_that_cannot_be_read(tmp_path, tokenizer, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path, tokenizer)


def test_an_empty_folder_and_one_without_training_rows(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="holds no file with one of the suffixes"):
        load(tmp_path, tokenizer)
    write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"has no training rows, only test\.jsonl"):
        load(tmp_path, tokenizer)


def row(number, text):
    ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
    return Row(f"row {number}", "text", Content("", text), Tokens(ids, ids))


def test_the_held_out_rows_are_exact_disjoint_and_drawn_by_the_seed():
    rows = [row(number, f"text {number}") for number in range(40)]
    train, held_out = hold_out(rows, 7, seed=0)
    assert len(held_out) == 7 and len(train) == 33 and not {row.place for row in train} & {r.place for r in held_out}
    places = [[row.place for row in hold_out(rows, 7, seed)[1]] for seed in (0, 0, 1)]
    assert places[0] == places[1] != places[2]
    with pytest.raises(
        ValueError, match="`--val_set_size` 40 should be smaller than the data, which has 40 usable rows"
    ):
        hold_out(rows, 40, seed=0)


def test_a_tenth_is_held_out_by_default(tmp_path, tokenizer):
    rows = load(write(tmp_path / "a.jsonl", ROWS), tokenizer, val_set_size=None)
    assert (len(rows.train), len(rows.validation)) == (36, 4)


def test_rows_with_the_same_tokens_stay_on_one_side(tmp_path, tokenizer):
    train, held_out = hold_out([row(f"{copy}-{n}", f"text {n}") for copy in range(3) for n in range(40)], 30, seed=0)
    assert len(held_out) == 30
    assert not {row.content for row in train} & {row.content for row in held_out}
    # Different rows, which the cut makes equal.
    rows = [{"text": "word " * 40 + str(number)} for number in range(20)]
    cut = load(write(tmp_path / "a.jsonl", rows), tokenizer, val_set_size=5, cutoff_len=16)
    assert (len(cut.train), cut.validation) == (20, None)
    assert cut.said[-1].endswith("0 rows held out for evaluation, not 5: rows with the same tokens stay together")
