"""Rows of several kinds, and conversations, in one file."""

import pytest

from tests.support.rows import MESSAGES, contents, load, tokenizer, write  # noqa: F401 (a fixture)

# ruff: noqa: F811 (the fixture's name)


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
    with pytest.raises(ValueError, match=r"`messages` or `conversations` in every row; a.jsonl, row 2 has text"):
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
