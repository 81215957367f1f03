"""Rows in the forms that other programs write, columns under other names, and several sources."""

import gzip
import json
from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from tests.support.training_runs import write_rows
from training import demo
from training.data.mapping import Mapping
from training.data.mixture import Part, parts_of
from training.data.rows import load_rows
from training.flags import parse_flags

ASK, TELL = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
SPOKEN = "User:\nWho?\nAssistant:\nMe.<eos>\n"


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.BASE)


def load(path, tokenizer, **options):
    settings = {"cutoff_len": 256, "val_set_size": 0, "bad_row_limit": 0.5, "seed": 0}
    return load_rows(str(path), tokenizer, **settings | options)


def written(rows, tokenizer):
    """Each row as text, and the part of it that is learned."""
    learned = [
        tokenizer.decode([token for token, label in zip(row["input_ids"], row["labels"]) if label >= 0])
        for row in rows.train
    ]
    return [tokenizer.decode(row["input_ids"]) for row in rows.train], learned


CONVERSATIONS = {
    "sharegpt": {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
    "conversations of messages": {"conversations": [ASK, TELL]},
    "text parts": {"messages": [ASK | {"content": [{"type": "text", "text": "Wh"}, {"text": "o?"}]}, TELL]},
    "strings as parts": {"messages": [ASK, TELL | {"content": ["M", "e."]}]},
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_as_others_write_them(tmp_path, tokenizer, name):
    rows = load(write_rows(tmp_path / "a.jsonl", [CONVERSATIONS[name]]), tokenizer)
    assert written(rows, tokenizer)[0] == [SPOKEN]


@pytest.mark.parametrize(
    "columns", [("question", "answer"), ("question", "response"), ("prompt", "response"), ("query", "response")]
)
def test_two_texts_are_a_turn_each_and_the_answer_is_learned(tmp_path, tokenizer, columns):
    rows = load(write_rows(tmp_path / "a.jsonl", [dict(zip(columns, ("Who?", "Me.")))]), tokenizer)
    assert written(rows, tokenizer) == ([SPOKEN], ["Me.<eos>\n"])


def test_an_instruction_and_its_response(tmp_path, tokenizer):
    row = {"instruction": "Say", "input": "Who?", "response": "Me."}
    rows = load(write_rows(tmp_path / "a.jsonl", [row, row | {"response": "You."}]), tokenizer)
    assert written(rows, tokenizer)[1] == ["Me.<eos>", "You.<eos>"]
    same = load(write_rows(tmp_path / "b.jsonl", [{"instruction": "Say", "input": "Who?", "output": "Me."}]), tokenizer)
    assert same.train[0]["input_ids"] == rows.train[0]["input_ids"]


def test_openais_tool_calls_with_null_content(tmp_path, tokenizer):
    """Their arguments are JSON in a text; the template writes the object."""
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"city": "Ulm"}'}}
    messages = [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "1", "content": "found"}, TELL]
    rows = load(write_rows(tmp_path / "a.jsonl", [{"messages": messages}]), tokenizer)
    (text,), _ = written(rows, tokenizer)
    assert '"arguments": {"city": "Ulm"}' in text and "None" not in text and text.endswith("Assistant:\nMe.<eos>\n")


def tabular(folder, rows):
    """A table, in which each struct has the fields of all others, as null."""
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def call_of(**arguments):
    return {"type": "function", "function": {"name": "find", "arguments": arguments}}


@pytest.mark.parametrize(
    "write", [tabular, lambda folder, rows: write_rows(folder / "a.jsonl", rows)], ids=["table", "json"]
)
def test_a_table_has_the_tokens_of_the_same_rows_in_json(tmp_path, tokenizer, write):
    """Templates ask whether a message has tool calls, and write tools and arguments as they are."""
    tokenizer.chat_template = (
        "{{ tools | tojson if tools }}{% for m in messages %}{{ m.content }}"
        "{% if 'tool_calls' in m %}{{ m.tool_calls | length }}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
    )
    tools = [{"name": name, "parameters": {name: {"type": "string"}}} for name in ("city", "day")]
    called = [ASK, {"role": "assistant", "content": "", "tool_calls": [call_of(city="Ulm"), call_of(day="1")]}]
    rows = load(
        write(tmp_path, [{"messages": called, "tools": tools}, {"messages": [ASK, TELL], "tools": tools[:1]}]),
        tokenizer,
    )
    assert rows.skipped == []
    assert not [text for text in written(rows, tokenizer)[0] if "null" in text]


def test_a_null_beside_a_message_is_no_tool_call(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}"
        "{% if 'tool_calls' in m %}{{ m.tool_calls | length }}{% endif %}{% endfor %}"
    )
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [ASK, TELL | {"tool_calls": None, "refusal": None}]}])
    assert load(path, tokenizer).skipped == []


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([ASK | {"content": [{"type": "image_url"}]}], "`messages` has a part of type image_url in its `content`"),
        ([{"from": "human"}], "`messages` has a `content` that should be text, got NoneType"),
        ([{"from": 3, "value": "a"}], "`messages` should hold messages with `role` and `content`, or `from` and"),
    ],
    ids=["image", "no value", "no role"],
)
def test_what_no_text_can_be_made_of_is_named(tmp_path, tokenizer, messages, reason):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [ASK, TELL]}, {"messages": messages}])
    (skipped,) = load(path, tokenizer).skipped
    assert skipped["place"] == "a.jsonl, row 2" and skipped["reason"].startswith(reason)


def test_compressed_files(tmp_path, tokenizer):
    row = json.dumps({"text": "compressed"}).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(row))
    (tmp_path / "b.CSV.GZ").write_bytes(gzip.compress(b"text\nas a table"))
    (tmp_path / "c.ndjson").write_bytes(row)
    rows = load(tmp_path, tokenizer)
    assert sorted(rows.train["text"]) == ["as a table", "compressed", "compressed"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(row)[:-9])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is not a readable gzip file"):
        load(tmp_path, tokenizer)


GERMAN = "\ufefffrage;antwort;art\nWer?;Ich.;kurz\nWas?;;kurz\n"


def test_columns_under_other_names(tmp_path, tokenizer):
    """The delimiter of a table whose columns nobody knows is the one that finds the most."""
    (tmp_path / "a.csv").write_text(GERMAN, encoding="utf-8")
    rows = load(tmp_path / "a.csv", tokenizer, mapping=Mapping({"question": "frage", "answer": "antwort"}))
    assert written(rows, tokenizer)[0] == ["User:\nWer?\nAssistant:\nIch.<eos>\n"]
    assert rows.skipped == [{"place": "a.csv, row 2", "reason": "`answer` is empty"}]
    with pytest.raises(ValueError, match=r"`--columns` names 'fragen', but `--data_path` .* has \['antwort', 'art'"):
        load(tmp_path / "a.csv", tokenizer, mapping=Mapping({"question": "fragen"}))


def test_a_prompt_from_a_template(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text(GERMAN, encoding="utf-8")
    mapping = Mapping({"completion": "antwort"}, "Antworte {art}: {frage} ")
    rows = load(tmp_path / "a.csv", tokenizer, mapping=mapping)
    assert written(rows, tokenizer) == (["Antworte kurz: Wer? Ich.<eos>"], ["Ich.<eos>"])
    with pytest.raises(ValueError, match="`--prompt_template` names 'fragen'"):
        load(tmp_path / "a.csv", tokenizer, mapping=Mapping({"completion": "antwort"}, "{fragen}"))


def test_the_yaml_says_the_same(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "base_model: a\ncolumns: {completion: antwort}\nprompt_template: 'Antworte {art}: {frage} '\n"
        "data_path: [x.jsonl, {path: y/z, weight: 0.5, config: main, split: test}]\n"
    )
    flags, _ = parse_flags(["--config", str(path)])
    assert flags.mapping == Mapping({"completion": "antwort"}, "Antworte {art}: {frage} ")
    assert parts_of(flags.data_path) == [Part("x.jsonl"), Part("y/z", 0.5, "main", "test")]


def test_sources_and_their_weights(tmp_path, tokenizer):
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name} {number}"} for number in range(20)])
        for name in ("once", "twice", "half")
    ]
    data_path = f"{paths[0]},{paths[1]}=2,{paths[2]}=0.5"
    first, again = (load(data_path, tokenizer, seed=3) for _ in range(2))
    counts = Counter(text.split()[0] for text in first.train["text"])
    assert counts == {"once": 20, "twice": 40, "half": 10} and len(set(first.train["text"])) == 50
    assert first.train["text"] == again.train["text"] != load(data_path, tokenizer, seed=4).train["text"]
    assert "by the weights of their sources a pass visits 70 rows" in first.said
    held = load(data_path, tokenizer, val_set_size=9)
    assert not set(held.validation["text"]) & set(held.train["text"]) and len(held.validation) == 9


@pytest.mark.parametrize(
    "data_path, message",
    [
        ("a.jsonl,b.jsonl=0", "b.jsonl: the weight should be above 0, got 0"),
        ('[{"path": "a", "weight": "much"}]', "a: the weight should be a number, got 'much'"),
        ('[{"file": "a"}]', "should list paths, or objects with path, weight, config, split"),
    ],
    ids=["zero", "no number", "no path"],
)
def test_sources_that_cannot_be(data_path, message):
    with pytest.raises(ValueError, match=message):
        parts_of(data_path)


def test_a_hub_data_sets_configuration_and_split(tmp_path, tokenizer, monkeypatch):
    asked = []

    def load_dataset(path, name=None, split=None):
        asked.append((path, name, split))
        return [{"text": "a"}] if split else {"train": [{"text": "a"}]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert load("owner/name", tokenizer, config="main", split="train[:5]").train["place"] == [
        "owner/name [train[:5]], row 1"
    ]
    load("owner/name", tokenizer)
    assert asked == [("owner/name", "main", "train[:5]"), ("owner/name", None, None)]
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"are for a data set on the Hub, but a\.txt is here"):
        load("a.txt", tokenizer, config="main")


def test_identical_complaints_are_one_line(tmp_path, tokenizer):
    rows = [{"text": "fine"}] * 30 + [{"text": ""}] * 12 + [{"text": 3}]
    said = "\n".join(load(write_rows(tmp_path / "a.jsonl", rows), tokenizer).said)
    assert (
        "13 of 43 rows cannot be used:\n  a.jsonl, row 31 and 11 more: `text` is empty\n  a.jsonl, row 43: `text`"
        in said
    )
