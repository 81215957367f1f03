"""Reading, detecting, checking and splitting the rows of a user's data."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from training import demo
from training.data.holdout import hold_out
from training.data.kinds import Content
from training.data.rows import load_rows
from training.data.tokens import CHAT_TEMPLATE, Row, Tokens
from training.finetune.output import write_account

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


# Long rows


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


# Rows of several kinds


def test_rows_of_several_kinds_are_all_read_and_counted(tmp_path, tokenizer):
    written = [
        {"messages": MESSAGES},
        {"text": "a"},
        {"prompt": "b", "completion": "c"},
        {"text": "d", "messages": None},
    ]
    rows = load(write(tmp_path / "a.jsonl", written), tokenizer, val_set_size=0)
    assert [row["place"] for row in rows.train] == [f"a.jsonl, row {number}" for number in (1, 2, 3, 4)]
    assert rows.kind == "messages, prompt + completion, text"
    assert rows.said[0].endswith("column text (2 rows); column messages (1 rows); columns prompt, completion (1 rows)")
    decoded = [tokenizer.decode(row["input_ids"]) for row in rows.train]
    assert decoded[1:] == ["a<eos>", "bc<eos>", "d<eos>"] and "two red mugs" in decoded[0]
    with pytest.raises(ValueError, match=r"`messages` in every row; a.jsonl, row 2 has text"):
        load(tmp_path / "a.jsonl", tokenizer, assistant_only_loss=True)


def test_a_conversation_beside_a_text_takes_the_text_as_a_message(tmp_path, tokenizer):
    user, assistant = [{"role": "user", "content": "ask"}], [{"role": "assistant", "content": "answer"}]
    written = [
        {"prompt": prompt, "completion": completion} for prompt in (user, "ask") for completion in (assistant, "answer")
    ]
    rows = load(write(tmp_path / "a.jsonl", written), tokenizer, val_set_size=0)
    ids = [row["input_ids"] for row in rows.train]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert contents(rows.train)[0] == {"messages": user + assistant}
    assert any(line.startswith("2 rows have a conversation on one side") for line in rows.said)


def test_keys_of_messages_may_differ_in_type(tmp_path, tokenizer):
    messages = [MESSAGES[0] | {"weight": 1}, MESSAGES[1] | {"weight": "none", "more": {"a": [1, "b"]}}]
    rows = load(write(tmp_path / "a.jsonl", [{"messages": messages}] * 3), tokenizer, val_set_size=0)
    assert contents(rows.train) == [{"messages": MESSAGES}] * 3


def test_a_conversation_that_the_template_refuses_is_named(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.first and m['role'] != 'user' %}{{ raise_exception('no system turn') }}"
        "{% endif %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    written = [{"messages": MESSAGES}] * 5 + [{"messages": [{"role": "system", "content": "be kind"}, *MESSAGES]}]
    rows = load(write(tmp_path / "a.jsonl", written), tokenizer, val_set_size=0)
    reason = "the chat template refuses the conversation (no system turn)"
    assert rows.skipped == [{"place": "a.jsonl, row 6", "reason": reason}] and len(rows.train) == 5


def test_a_turn_of_the_assistant_is_needed_where_it_alone_is_trained(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"messages": MESSAGES}] * 3 + [{"messages": MESSAGES[:1]}])
    rows = load(path, tokenizer, val_set_size=0, assistant_only_loss=True, bad_row_limit=0)
    assert rows.skipped == [{"place": "a.jsonl, row 4", "reason": "nothing to train on"}]
    trained = [label for label in rows.train[0]["labels"] if label >= 0]
    assert tokenizer.decode(trained) == "red mugs<eos>"
    assert len(load(path, tokenizer, val_set_size=0).train) == 4


# The account


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
