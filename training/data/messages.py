"""Conversations: what makes one unusable, and its form for a chat template.

Understood are messages with `role` and `content`, as OpenAI and transformers have them, and with `from` and `value`, as
ShareGPT has them. A content may be a list of text parts. Of tool calls the content may be null, and the arguments may
be JSON in a text.
"""

import json

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
    "system": "system",
}
"""ShareGPT's names of the roles."""


def problem_of_messages(messages) -> str | None:
    """Why a conversation cannot be used, or None."""
    if not isinstance(messages, list):
        return "is missing" if messages is None else f"should be a list of messages, got {type(messages).__name__}"
    if not messages:
        return "is empty"
    for message in messages:
        role, content = _role_and_content(message)
        if not isinstance(role, str):
            return "should hold messages with `role` and `content`, or `from` and `value`"
        if content is None and message.get("tool_calls"):
            continue
        if isinstance(content, list):
            if other := next((part for part in content if _text_of(part) is None), None):
                kind = other.get("type") if isinstance(other, dict) else type(other).__name__
                return f"has a part of type {kind} in its `content`, where text is trained alone"
            content = "".join(map(_text_of, content))
        if not isinstance(content, str):
            return f"has a `content` that should be text, got {type(content).__name__}"
        if not (is_unicode(content) and is_unicode(role)):
            return "is not UTF-8"
    return None


def messages_of(messages: list[dict]) -> list[dict]:
    """A conversation, checked by `problem_of_messages`, with roles, texts and tool calls as templates read them."""
    return [_message(message) for message in messages]


def turns_of(value: str | list[dict], role: str) -> list[dict]:
    """A conversation; a text becomes a message of `role`."""
    return [{"role": role, "content": value}] if isinstance(value, str) else messages_of(value)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _role_and_content(message) -> tuple:
    if not isinstance(message, dict):
        return None, None
    if "role" not in message and isinstance(message.get("from"), str):
        return ROLES.get(message["from"].lower(), message["from"]), message.get("value")
    return message.get("role"), message.get("content")


def _message(message: dict) -> dict:
    role, content = _role_and_content(message)
    if isinstance(content, list):
        content = "".join(map(_text_of, content))
    # Templates ask whether a message has tool calls: a null is none.
    kept = {name: value for name, value in message.items() if name not in ("from", "value") and value is not None}
    kept |= {"role": role, "content": content or ""}
    if calls := message.get("tool_calls"):
        kept["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return kept


def _text_of(part) -> str | None:
    """The text of a part of a content; None for an image, or what else is no text."""
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
    return text if isinstance(text, str) else None


def _with_parsed_arguments(call):
    """OpenAI writes a call's arguments as JSON in a text; chat templates write the object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return call | {"function": function | {"arguments": arguments}}
