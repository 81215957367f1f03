"""Rows as TRL's SFTTrainer takes them: columns detected, bad rows named, a validation split."""

import hashlib
import json
import random
from collections import defaultdict
from dataclasses import dataclass, field

import datasets
from transformers import PreTrainedTokenizerBase

from .sources import SourceRow, read_source

# The columns that make each kind, in the order in which they are looked for.
KINDS = {
    "messages": ("messages",),
    "prompt + completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
NAMED = 10  # bad rows named on the screen; all of them go into the skipped file
LARGEST_DEFAULT = 500
# For bases without a chat template: plain words, no token that the base has never seen. The end-of-text token closes
# every answer, and the generation marks say which tokens --assistant_only_loss learns.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)


@dataclass
class Rows:
    """What a run trains and evaluates on. Each dataset has the kind's columns and `place`, where its row stood."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    kind: str
    said: list[str] = field(default_factory=list)  # what was found, for the user
    skipped: list[dict] = field(default_factory=list)  # place and reason

    @property
    def fingerprint(self) -> str:
        """The sha256 of all rows, by which a resumed run knows its data."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation or []):
            for row in part:
                digest.update(json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()


def load_rows(
    data_path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cutoff_len: int,
    val_set_size: int | None,
    bad_row_limit: float,
    seed: int,
) -> Rows:
    """Read, check and split. `tokenizer` is given a chat template if the rows need one and it has none.

    Raises ValueError if the columns are not known, if more than `bad_row_limit` of the rows are unusable, or if
    `val_set_size` leaves nothing to train on.
    """
    splits = read_source(data_path)
    kind = detect_kind(data_path, splits["train"])
    said = [f"data: {data_path}, column{'s' * (len(KINDS[kind]) > 1)} {', '.join(KINDS[kind])}"]
    if is_conversation(splits["train"], kind) and tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
        said.append("the tokenizer has no chat template: messages are written as `Role:` lines, and the template saved")
    if is_conversation(splits["train"], kind) and (end := foreign_end(tokenizer)):
        said.append(f"the chat template ends an answer with {end!r}, not with the end-of-text {tokenizer.eos_token!r}")
    skipped: list[dict] = []
    good = {split: _usable(rows, kind, tokenizer, cutoff_len, skipped) for split, rows in splits.items()}
    total = sum(len(rows) for rows in splits.values())
    if skipped:
        said.append(_describe(skipped, total))
    if len(skipped) > bad_row_limit * total:
        raise ValueError(
            f"{said[-1]}\nthat is more than --bad_row_limit {bad_row_limit:g} of the rows: repair the data, "
            "raise --cutoff_len if they are too long, or raise the limit"
        )
    held_out = next((split for split in ("validation", "test") if good.get(split)), None)
    if held_out:
        train, validation = good["train"], good[held_out]
        ignored = f"; --val_set_size {val_set_size} is not used" if val_set_size is not None else ""
        said.append(f"{len(train)} training rows; evaluated on the {held_out} split of {len(validation)}{ignored}")
    else:
        train, validation = cut(good["train"], val_set_size, seed)
        said.append(f"{len(train)} training rows; {len(validation)} rows held out for evaluation")
    if not train:
        raise ValueError(f"`--data_path` {data_path} has no usable training rows")
    evaluated = datasets.Dataset.from_list(validation) if validation else None
    return Rows(datasets.Dataset.from_list(train), evaluated, kind, said, skipped)


def detect_kind(data_path: str, rows: list[SourceRow]) -> str:
    """The kind whose columns the first readable row has."""
    first = next((row.values for row in rows if row.values is not None), None)
    if first is None:
        raise ValueError(f"`--data_path` {data_path} has no rows")
    for kind, columns in KINDS.items():
        if set(columns) <= first.keys():
            return kind
    expected = " or ".join(" + ".join(columns) for columns in KINDS.values())
    raise ValueError(f"`--data_path` {data_path} has the columns {sorted(first)}; expected {expected}")


def is_conversation(rows: list[SourceRow], kind: str) -> bool:
    """Whether rows hold lists of messages, which a chat template turns into text."""
    first = next(row.values for row in rows if row.values is not None)
    return kind == "messages" or (kind == "prompt + completion" and isinstance(first["prompt"], list))


def foreign_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the chat template writes after an answer, if the tokenizer's end-of-text token is not in it."""
    messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "the answer"}]
    end = tokenizer.apply_chat_template(messages, tokenize=False).rpartition("the answer")[2]
    return None if tokenizer.eos_token in end else end


def cut(rows: list[dict], size: int | None, seed: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out rows, drawn by `seed`. Equal rows stay on one side.

    Raises ValueError if `size` leaves nothing to train on.
    """
    if size is None:
        size = min(LARGEST_DEFAULT, len(rows) // 10)
    if size >= len(rows):
        raise ValueError(f"`--val_set_size` {size} should be smaller than the data, which has {len(rows)} usable rows")
    equal = defaultdict(list)
    for index, row in enumerate(rows):
        equal[json.dumps({name: value for name, value in row.items() if name != "place"})].append(index)
    groups = list(equal.values())
    random.Random(seed).shuffle(groups)
    held_out: set[int] = set()
    for group in groups:
        if len(held_out) + len(group) <= size:
            held_out.update(group)
    return (
        [row for index, row in enumerate(rows) if index not in held_out],
        [row for index, row in enumerate(rows) if index in held_out],
    )


def _usable(rows: list[SourceRow], kind: str, tokenizer, cutoff_len: int, skipped: list[dict]) -> list[dict]:
    """The rows that can be trained on, with the others added to `skipped`."""
    converted = []
    for row in rows:
        problem = row.problem or problem_of(row.values, kind)
        if problem:
            skipped.append({"place": row.place, "reason": problem})
        else:
            converted.append(_convert(row.values, kind) | {"place": row.place})
    usable = []
    for row, length in zip(converted, token_lengths(converted, tokenizer)):
        if length > cutoff_len:
            # Cutting it would cut the end of the text off, and with it what teaches the model to stop.
            reason = f"too long: {length} tokens, more than --cutoff_len {cutoff_len}"
            skipped.append({"place": row["place"], "reason": reason})
        else:
            usable.append(row)
    return usable


def problem_of(values: dict, kind: str) -> str | None:
    """Why a row of this kind cannot be used, or None."""
    for column in KINDS[kind]:
        value = values.get(column)
        if column == "messages" or (isinstance(value, list) and kind == "prompt + completion"):
            problem = _problem_of_messages(value)
        elif not isinstance(value, str):
            problem = "is missing" if value is None else f"should be text, got {type(value).__name__}"
        else:
            problem = _problem_of_text(value)
        if problem:
            return f"`{column}` {problem}"
    if (extra := values.get("input")) is not None and kind == "instruction" and not isinstance(extra, str):
        return f"`input` should be text, got {type(extra).__name__}"
    return None


def _problem_of_text(text: str) -> str | None:
    if not text.strip():
        return "is empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None


def _problem_of_messages(messages) -> str | None:
    if not isinstance(messages, list):
        return "is missing" if messages is None else f"should be a list of messages, got {type(messages).__name__}"
    if not messages:
        return "is empty"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "should hold messages with `role` and `content`"
        if not isinstance(message.get("content"), str):
            return f"has a `content` that should be text, got {type(message.get('content')).__name__}"
        if _problem_of_text(message["content"]) == "is not UTF-8":
            return "is not UTF-8"
    return None


def _convert(values: dict, kind: str) -> dict:
    """The columns that TRL reads, and no others."""
    if kind == "instruction":
        given = f"### Input:\n{values['input']}\n\n" if (values.get("input") or "").strip() else ""
        prompt = f"### Instruction:\n{values['instruction']}\n\n{given}### Response:\n"
        return {"prompt": prompt, "completion": values["output"]}
    return {column: values[column] for column in KINDS[kind]}


def token_lengths(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """How many tokens each row will have, its end-of-text token included."""
    if not rows:
        return []
    texts, lengths = [], []
    for row in rows:
        parts = [row[column] for column in ("messages", "prompt", "completion", "text") if column in row]
        if isinstance(parts[0], list):
            conversation = [message for part in parts for message in part]
            lengths.append(len(tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]))
        else:
            text = "".join(parts)
            texts.append(text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token)
    return lengths or [len(ids) for ids in tokenizer(texts)["input_ids"]]


def _describe(skipped: list[dict], total: int) -> str:
    lines = [f"{len(skipped)} of {total} rows cannot be used:"]
    lines += [f"  {row['place']}: {row['reason']}" for row in skipped[:NAMED]]
    if len(skipped) > NAMED:
        lines.append(f"  and {len(skipped) - NAMED} more")
    return "\n".join(lines)
