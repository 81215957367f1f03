"""The kinds of rows: which columns each has, what makes a row unusable, and its form for the tokenizer."""

import json
from typing import NamedTuple

# The columns of each kind, in the order in which they are looked for.
KINDS = {
    "messages": ("messages",),
    "prompt + completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}


# The kinds whose rows may hold messages, and then `tools`.
CONVERSATIONS = ("messages", "prompt + completion")


class Content(NamedTuple):
    """A row to tokenise: a prompt that is not trained, and what follows it, both texts or both conversations."""

    prompt: str | list[dict]  # empty: everything is trained
    completion: str | list[dict]
    tools: list | None = None

    @property
    def is_conversation(self) -> bool:
        """Whether a chat template turns the row into text."""
        return isinstance(self.completion, list)


def kind_of(values: dict) -> str | None:
    """The first kind whose columns the row has, one of them not null; None for columns of no kind."""
    complete = [kind for kind, columns in KINDS.items() if set(columns) <= values.keys()]
    filled = [kind for kind in complete if any(values[column] is not None for column in KINDS[kind])]
    return next(iter([*filled, *complete]), None)


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
    if kind == "instruction" and (extra := values.get("input")) is not None:
        if not isinstance(extra, str):
            return f"`input` should be text, got {type(extra).__name__}"
        if extra.strip() and (problem := _problem_of_text(extra)):
            return f"`input` {problem}"
    return _problem_of_tools(values.get("tools")) if kind in CONVERSATIONS else None


def content_of(values: dict, kind: str) -> Content:
    """The row, checked by `problem_of`, for the tokenizer."""
    if kind == "text":
        return Content("", values["text"])
    if kind == "messages":
        return Content([], values["messages"], _tools(values))
    if kind == "instruction":
        extra = values.get("input") or ""
        given = f"### Input:\n{extra}\n\n" if extra.strip() else ""
        return Content(f"### Instruction:\n{values['instruction']}\n\n{given}### Response:\n", values["output"])
    prompt, completion = values["prompt"], values["completion"]
    if is_one_sided(values):
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        completion = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    return Content(prompt, completion, _tools(values) if isinstance(prompt, list) else None)


def is_one_sided(values: dict) -> bool:
    """Whether one of prompt and completion is a conversation and the other a text, which becomes a message."""
    return {type(values["prompt"]), type(values["completion"])} == {list, str}


def columns_of(kind: str) -> set[str]:
    """Every column that is read of a row of this kind."""
    optional = {"input"} if kind == "instruction" else {"tools"} if kind in CONVERSATIONS else set()
    return {*KINDS[kind], *optional}


def _tools(values: dict) -> list | None:
    tools = values.get("tools")
    return (json.loads(tools) if isinstance(tools, str) else tools) or None


def _problem_of_tools(tools) -> str | None:
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError):
        return "`tools` is not valid JSON"
    return None if tools is None or isinstance(tools, list) else f"`tools` should be a list, got {type(tools).__name__}"


def _problem_of_text(text: str) -> str | None:
    if not text.strip():
        return "is empty"
    return None if _is_unicode(text) else "is not UTF-8"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _problem_of_messages(messages) -> str | None:
    if not isinstance(messages, list):
        return "is missing" if messages is None else f"should be a list of messages, got {type(messages).__name__}"
    if not messages:
        return "is empty"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "should hold messages with `role` and `content`"
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            return f"has a `content` that should be text, got {type(content).__name__}"
        if not (_is_unicode(content) and _is_unicode(message["role"])):
            return "is not UTF-8"
    return None
