"""The kinds of rows: which columns each has, what makes a row unusable, and its form for the tokenizer."""

import json
from typing import NamedTuple

from .messages import is_unicode, messages_of, problem_of_messages, turns_of

# The columns of each kind, in the order in which they are looked for.
KINDS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt + completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "instruction + response": ("instruction", "response"),
    "question + answer": ("question", "answer"),
    "question + response": ("question", "response"),
    "prompt + response": ("prompt", "response"),
    "query + response": ("query", "response"),
    "text": ("text",),
}
CHATS = ("messages", "conversations")
"""The kinds whose one column is a conversation."""
CONVERSATIONS = (*CHATS, "prompt + completion")
"""The kinds whose rows may hold messages, and then `tools`."""
INSTRUCTIONS = ("instruction", "instruction + response")
TURNS = ("question + answer", "question + response", "prompt + response", "query + response")
"""Two texts: a turn of the user, and the assistant's, which is learned."""


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


def is_row(values: dict) -> bool:
    """Whether an object has the columns of a row, of a preference too."""
    return kind_of(values) is not None or {"chosen", "rejected"} <= values.keys()


def problem_of(values: dict, kind: str) -> str | None:
    """Why a row of this kind cannot be used, or None."""
    for column in KINDS[kind]:
        value = values.get(column)
        if kind in CHATS or (isinstance(value, list) and kind == "prompt + completion"):
            problem = problem_of_messages(value)
        elif not isinstance(value, str):
            problem = "is missing" if value is None else f"should be text, got {type(value).__name__}"
        else:
            problem = _problem_of_text(value)
        if problem:
            return f"`{column}` {problem}"
    if kind in INSTRUCTIONS and (extra := values.get("input")) is not None:
        if not isinstance(extra, str):
            return f"`input` should be text, got {type(extra).__name__}"
        if extra.strip() and (problem := _problem_of_text(extra)):
            return f"`input` {problem}"
    return _problem_of_tools(values.get("tools")) if kind in CONVERSATIONS else None


def content_of(values: dict, kind: str) -> Content:
    """The row, checked by `problem_of`, for the tokenizer."""
    if kind == "text":
        return Content("", values["text"])
    if kind in CHATS:
        return Content([], messages_of(values[kind]), _tools(values))
    first, last = (values[column] for column in KINDS[kind])
    if kind in INSTRUCTIONS:
        extra = values.get("input") or ""
        given = f"### Input:\n{extra}\n\n" if extra.strip() else ""
        return Content(f"### Instruction:\n{first}\n\n{given}### Response:\n", last)
    if kind in TURNS or is_one_sided(values) or isinstance(first, list):
        return Content(turns_of(first, "user"), turns_of(last, "assistant"), _tools(values))
    return Content(first, last)


def is_conversation(values: dict, kind: str | None) -> bool:
    """Whether a chat template writes a row of this kind."""
    return kind in (*CHATS, *TURNS) or (kind == "prompt + completion" and isinstance(values["prompt"], list))


def is_one_sided(values: dict) -> bool:
    """Whether one of prompt and completion is a conversation and the other a text, which becomes a message."""
    return {type(values["prompt"]), type(values["completion"])} == {list, str}


def columns_of(kind: str) -> set[str]:
    """Every column that is read of a row of this kind."""
    optional = {"input"} if kind in INSTRUCTIONS else {"tools"} if kind in CONVERSATIONS else set()
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
    return None if is_unicode(text) else "is not UTF-8"
