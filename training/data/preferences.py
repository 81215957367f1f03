"""Rows of preferences, for `--task dpo`, `orpo` and `kto`: checked, counted and split; TRL's trainers tokenise them."""

import datasets
from transformers import PreTrainedTokenizerBase

from .account import Account
from .formats import SourceRow
from .holdout import split_rows
from .kinds import Content
from .messages import messages_of, problem_of_messages
from .mixture import mixed
from .order import IGNORED
from .rows import Rows
from .sources import Source
from .tokens import CHAT_TEMPLATE, Row, Tokens, tokenized

PAIRS = ("dpo", "orpo")
"""The tasks whose rows hold a better and a worse answer. A row of `kto` holds one answer, and whether it is good."""
LABELS = {True: True, False: False, "true": True, "false": False, "good": True, "bad": False}


def columns_of(task: str) -> tuple[str, ...]:
    """The columns that a row must have."""
    return ("chosen", "rejected") if task in PAIRS else ("prompt", "completion", "label")


def preference_rows(
    task: str,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    account: Account,
    *,
    val_set_size: float | None,
    bad_row_limit: float,
    seed: int,
) -> Rows:
    """Training and evaluation rows with TRL's columns. `tokenizer` gets a chat template if it has none and needs one.

    Raises:
        ValueError: no row has the columns, too many cannot be used, or nothing is left to train on.
    """
    columns = columns_of(task)
    present = {str(name) for rows in source.splits.values() for row in rows if row.values for name in row.values}
    if missing := [name for name in columns if name not in present]:
        raise ValueError(
            f"`--task {task}` needs the columns {', '.join(columns)}; `--data_path` {account.data_path} lacks "
            f"{', '.join(missing)} and has {sorted(present)[:20]}"
        )
    account.notes.append(f"data: {account.data_path}, columns {', '.join(columns)}")
    account.notes += source.notes
    rows = [row for rows in source.splits.values() for row in rows if row.values]
    if tokenizer.chat_template is None and any(isinstance(row.values.get(columns[0]), list) for row in rows):
        tokenizer.chat_template = CHAT_TEMPLATE
        account.notes.append(
            "the tokenizer has no chat template: messages are written as `Role:` lines, and the template saved"
        )
    usable = {
        split: [row for found in rows if (row := _usable(task, found, tokenizer, account)) is not None]
        for split, rows in source.splits.items()
    }
    account.check(bad_row_limit)
    train, validation = split_rows(usable, val_set_size, seed, account)
    train = mixed(train, seed)
    return Rows(
        _dataset(task, train),
        _dataset(task, validation) if validation else None,
        " + ".join(columns),
        account.notes,
        account.skipped,
        account.cut,
        trained=[*_present(task, train), "place"],
    )


def _usable(task: str, found: SourceRow, tokenizer, account: Account) -> Row | None:
    """The row, with the tokens of its longer answer, or None and an entry in the account."""
    problem = found.problem or _problem_of(task, found.values)
    if problem:
        return account.leave_out_bad(found.place, problem)
    values = _values(task, found.values)
    try:
        sides = [_tokens(values.get("prompt"), values[name], tokenizer) for name in _answers(task)]
    except ValueError as error:
        return account.leave_out_bad(found.place, str(error))
    fitted = account.fit(found.place, max(sides, key=lambda tokens: len(tokens.ids)))
    if fitted is None:
        return None
    return Row(found.place, task, Content("", "", None), fitted, found.weight, values)


def _answers(task: str) -> tuple[str, ...]:
    return ("chosen", "rejected") if task in PAIRS else ("completion",)


def _problem_of(task: str, values: dict) -> str | None:
    texts = [*_answers(task), *(["prompt"] if values.get("prompt") is not None or task not in PAIRS else [])]
    for name in texts:
        value = values.get(name)
        if isinstance(value, list):
            problem = problem_of_messages(value)
        elif not isinstance(value, str):
            problem = "is missing" if value is None else f"should be text or messages, got {type(value).__name__}"
        else:
            problem = None if value.strip() else "is empty"
        if problem:
            return f"`{name}` {problem}"
    if len({isinstance(values[name], list) for name in texts}) > 1:
        return f"{', '.join(f'`{name}`' for name in texts)} should all be texts, or all messages"
    if task in PAIRS and values["chosen"] == values["rejected"]:
        return "`chosen` and `rejected` are the same"
    if task not in PAIRS and _label(values.get("label")) is None:
        return f"`label` should be true or false, got {values.get('label')!r}"
    return None


def _label(value) -> bool | None:
    return LABELS.get(value.strip().lower() if isinstance(value, str) else value)


def _values(task: str, values: dict) -> dict:
    """The columns that TRL reads, with messages as chat templates read them."""
    names = [*_answers(task), *(["prompt"] if values.get("prompt") is not None else [])]
    kept = {name: messages_of(values[name]) if isinstance(values[name], list) else values[name] for name in names}
    for name, value in kept.items():
        if isinstance(value, list):
            kept[name] = [{"role": message["role"], "content": message["content"]} for message in value]
    return kept if task in PAIRS else kept | {"label": _label(values["label"])}


def _tokens(prompt, answer, tokenizer) -> Tokens:
    content = Content(prompt or ("" if isinstance(answer, str) else []), answer)
    tokens = tokenized(content, tokenizer)
    if (tokens.labels != IGNORED).sum() < 1:
        raise ValueError("the answer has no token")
    return tokens


def _present(task: str, rows: list[Row]) -> list[str]:
    names = dict.fromkeys(("prompt", *columns_of(task)))
    return [name for name in names if any(name in row.values for row in rows)]


def _dataset(task: str, rows: list[Row]) -> datasets.Dataset:
    names = _present(task, rows)
    return datasets.Dataset.from_list(
        [{name: row.values.get(name) for name in names} | {"place": row.place} for row in rows]
    )
