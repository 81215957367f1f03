"""Rows as token ids and labels, as TRL's SFTTrainer makes them, and cut to a length."""

from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from .kinds import Content
from .order import IGNORED

# For bases without a chat template. It is plain text: no token that the base has never seen. The end-of-text token
# closes every answer, and the generation marks are what --assistant_only_loss trains.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)


class Tokens(NamedTuple):
    """One row: token ids, and labels that are the ids or `IGNORED`; int32 [length] each."""

    ids: np.ndarray
    labels: np.ndarray

    @property
    def trained(self) -> int:
        """The number of tokens that are learned. The first token has none before it to be predicted from."""
        return int((self.labels[1:] != IGNORED).sum())

    def cut(self, length: int) -> "Tokens":
        """The first `length` tokens. An end-of-text token beyond them is lost, and none is put in its place."""
        return Tokens(self.ids[:length], self.labels[:length])


class Row(NamedTuple):
    """A row that can be trained on."""

    place: str
    kind: str
    content: Content
    tokens: Tokens
    weight: float = 1  # of its source (`mixture`)
    values: dict | None = None  # the columns of a preference


def tokenized(
    content: Content,
    tokenizer: PreTrainedTokenizerBase,
    *,
    assistant_only_loss: bool = False,
    chat_template: str | None = None,
) -> Tokens:
    """A row's tokens. A text ends in the end-of-text token; of a conversation the chat template decides.

    A prompt is not trained, and with `assistant_only_loss` neither is anything but the assistant's turns.

    Args:
        chat_template: used in place of the tokenizer's own.

    Raises:
        ValueError: the chat template refuses the conversation.
    """
    prompt, completion, tools = content
    if not content.is_conversation:
        completion += "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
        ids = tokenizer(prompt + completion)["input_ids"]
        return _with_labels(ids, _common_length(tokenizer(prompt)["input_ids"], ids) if prompt else 0)
    options = {"tools": tools, "chat_template": chat_template, "return_dict": True}
    try:
        result = tokenizer.apply_chat_template(
            prompt + completion, return_assistant_tokens_mask=assistant_only_loss, **options
        )
        before = []
        if prompt:
            before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
    except Exception as error:  # a template can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the chat template refuses the conversation ({reason})") from None
    tokens = _with_labels(result["input_ids"], _common_length(before, result["input_ids"]))
    if assistant_only_loss:
        tokens.labels[np.asarray(result["assistant_masks"]) == 0] = IGNORED
    return tokens


def template_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the chat template writes after an answer, if the tokenizer's end-of-text token is not in it."""
    messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "the answer"}]
    try:
        end = tokenizer.apply_chat_template(messages, tokenize=False).rpartition("the answer")[2]
    except Exception:  # a template can raise anything; it will refuse the rows by name
        return None
    return None if tokenizer.eos_token in end else end


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that marks the assistant's turns, or None if the tokenizer's own does.

    Raises:
        ValueError: neither the template nor TRL knows where an assistant's turn begins and ends.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ValueError(f"`--assistant_only_loss` cannot be used with this chat template: {error}") from None


def _with_labels(ids: list[int], prompt_length: int) -> Tokens:
    tokens = np.asarray(ids, dtype=np.int32)
    labels = tokens.copy()
    labels[:prompt_length] = IGNORED
    return Tokens(tokens, labels)


def _common_length(ids: list[int], others: list[int]) -> int:
    """How many tokens both begin with. Tokens can merge where prompt and completion meet."""
    pairs = zip(ids, others)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(others)))
