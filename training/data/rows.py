"""Training and evaluation rows: read, checked, tokenised, cut to length and split, with an account of every row."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import datasets
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .account import Account
from .formats import SourceRow
from .holdout import split_rows
from .kinds import CHATS, KINDS, columns_of, content_of, is_conversation, is_one_sided, kind_of, problem_of
from .mapping import Mapping
from .mixture import mixed, parts_of
from .sources import read_sources
from .tokens import CHAT_TEMPLATE, Row, template_end, tokenized, training_template

TRAINED = ["input_ids", "labels", "place"]
"""The columns that the trainer takes; the others are for reading."""


@dataclass
class Rows:
    """What a run trains and evaluates on.

    Each dataset has `input_ids` and `labels` (int32), `place`, where its row stood, and the row's own columns.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    kind: str  # the kinds of the rows, separated by commas
    said: list[str] = field(default_factory=list)  # notes for the user
    skipped: list[dict] = field(default_factory=list)  # `place` and `reason` of each row left out
    cut: list[dict] = field(default_factory=list)  # `place`, `tokens` and `kept` of each row that was cut
    trained: list[str] = field(default_factory=lambda: TRAINED)  # the columns that the trainer takes

    @property
    def fingerprint(self) -> str:
        """The sha256 of all rows. A resumed run compares it with its own."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation or []):
            digest.update(f"{len(part)} rows\n".encode())
            for row in part:
                digest.update(repr([row[name] for name in self.trained]).encode())
        return digest.hexdigest()


def load_rows(
    data_path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cutoff_len: int,
    val_set_size: float | None,
    bad_row_limit: float,
    seed: int,
    long_rows: str = "truncate",
    assistant_only_loss: bool = False,
    mapping: Mapping | None = None,
    config: str = "",
    split: str = "",
    task: str = "sft",
) -> Rows:
    """Read, check, tokenise and split. `tokenizer` gets a chat template if the rows need one and it has none.

    Args:
        cutoff_len: the most tokens of a row. `long_rows` says what happens to longer ones: "truncate" or "drop".
        val_set_size: rows to hold out where the data has no split of its own, or below 1 their share; None takes a
            tenth, at most 500.
        bad_row_limit: the share of unusable rows above which this raises. Long rows do not count.
        mapping: columns under other names, and a template of the prompt.
        config, split: of a data set on the Hub.
        task: "sft" reads texts; the others read preferences.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read, has columns of no kind, has too many unusable rows, or
            leaves nothing to train on.
    """
    source = read_sources(parts_of(data_path, config, split))
    if mapping:
        source.splits = mapping.apply(data_path, source.splits)
    account = Account(data_path, cutoff_len, long_rows)
    if task != "sft":
        from .preferences import preference_rows

        options = {"val_set_size": val_set_size, "bad_row_limit": bad_row_limit, "seed": seed}
        return preference_rows(task, source, tokenizer, account, **options)
    kinds = kinds_of_rows(data_path, source.splits)
    account.note_columns(kinds, _unread_columns(source.splits))
    account.notes += source.notes
    template = _prepare_template(tokenizer, source.splits, assistant_only_loss, account)
    usable: dict[str, list[Row]] = {}
    for split, rows in source.splits.items():
        usable[split] = [
            row
            for found in tqdm(rows, desc="tokenising", unit="row", delay=5, leave=False, disable=None)
            if (row := _usable(found, kinds, tokenizer, template, assistant_only_loss, account)) is not None
        ]
    account.check(bad_row_limit)
    train, validation = split_rows(usable, val_set_size, seed, account)
    if len(mixture := mixed(train, seed)) != len(train):
        account.notes.append(f"by the weights of their sources a pass visits {len(mixture)} rows")
    train = mixture
    return Rows(
        _dataset(train),
        _dataset(validation) if validation else None,
        ", ".join(kind for kind in KINDS if kind in {row.kind for row in train}),
        account.notes,
        account.skipped,
        account.cut,
    )


def kinds_of_rows(data_path: str, splits: dict[str, list[SourceRow]]) -> Counter:
    """How many rows have each kind's columns, the most frequent first.

    Raises:
        ValueError: there are no rows, or no row has the columns of a kind.
    """
    rows = [row for rows in splits.values() for row in rows]
    if not rows:
        raise ValueError(f"`--data_path` {data_path} has no rows")
    readable = [row.values for row in rows if row.values is not None]
    counts = Counter(kind for values in readable if (kind := kind_of(values)))
    if readable and not counts:
        expected = " or ".join(" + ".join(columns) for columns in KINDS.values())
        raise ValueError(
            f"`--data_path` {data_path} has the columns {sorted(map(str, readable[0]))[:20]}; expected {expected}; "
            "--columns prompt=theirs,completion=theirs reads them under other names"
        )
    return Counter(dict(counts.most_common()))


def _unread_columns(splits: dict[str, list[SourceRow]]) -> list[str]:
    unread: set[str] = set()
    for row in (row for rows in splits.values() for row in rows if row.values is not None):
        if kind := kind_of(row.values):
            unread |= {str(name) for name in row.values.keys() - columns_of(kind)}
    return sorted(unread)


def _prepare_template(
    tokenizer, splits: dict[str, list[SourceRow]], assistant_only_loss: bool, account: Account
) -> str | None:
    """The chat template to use in place of the tokenizer's own, which is supplied if there is none."""
    rows = [(row, kind_of(row.values)) for rows in splits.values() for row in rows if row.values is not None]
    conversations = any(is_conversation(row.values, kind) for row, kind in rows)
    other = next(((row, kind) for row, kind in rows if kind and kind not in CHATS), None)
    if assistant_only_loss and other:
        raise ValueError(
            "`--assistant_only_loss` needs the column `messages` or `conversations` in every row; "
            f"{other[0].place} has {other[1]}"
        )
    one_sided = sum(kind == "prompt + completion" and is_one_sided(row.values) for row, kind in rows)
    if one_sided:
        account.notes.append(
            f"{one_sided} rows have a conversation on one side and a text on the other: the text is taken as a message "
            "of the user (prompt) or of the assistant (completion)"
        )
    if not (conversations or one_sided):
        return None
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
        account.notes.append(
            "the tokenizer has no chat template: messages are written as `Role:` lines, and the template saved"
        )
    if (end := template_end(tokenizer)) is not None:
        account.notes.append(
            f"the chat template ends an answer with {end!r}, not with the end-of-text {tokenizer.eos_token!r}"
        )
    return training_template(tokenizer) if assistant_only_loss else None


def _usable(
    found: SourceRow, kinds: Counter, tokenizer, template: str | None, assistant_only_loss: bool, account: Account
) -> Row | None:
    """The row with its tokens, or None and an entry in the account."""
    kind = kind_of(found.values) if found.values is not None else None
    problem = found.problem or (problem_of(found.values, kind) if kind else _missing(found.values, kinds))
    if problem:
        return account.leave_out_bad(found.place, problem)
    content = content_of(found.values, kind)
    try:
        tokens = tokenized(content, tokenizer, assistant_only_loss=assistant_only_loss, chat_template=template)
    except ValueError as error:
        return account.leave_out_bad(found.place, str(error))
    tokens = account.fit(found.place, tokens)
    return None if tokens is None else Row(found.place, kind, content, tokens, found.weight)


def _missing(values: dict, kinds: Counter) -> str:
    """The column that a row lacks for the most frequent kind."""
    most_frequent = next(iter(kinds))
    return next(f"`{column}` is missing" for column in KINDS[most_frequent] if column not in values)


def _dataset(rows: list[Row]) -> datasets.Dataset:
    """Columns of texts and conversations that some row has, for reading, besides those that are trained on."""
    ids = datasets.List(datasets.Value("int32"))
    message = {"role": datasets.Value("string"), "content": datasets.Value("large_string")}
    text = datasets.Value("large_string")
    types = {"input_ids": ids, "labels": ids, "place": datasets.Value("string")}
    types |= {"prompt": text, "completion": text, "text": text, "messages": datasets.List(message)}
    cells = [_cells(row) for row in rows]
    present = [name for name in types if any(name in row for row in cells)]
    features = datasets.Features({name: types[name] for name in present})
    return datasets.Dataset.from_dict({name: [row.get(name) for row in cells] for name in present}, features)


def _cells(row: Row) -> dict:
    cells = {"input_ids": row.tokens.ids, "labels": row.tokens.labels, "place": row.place}
    prompt, completion, _ = row.content
    if row.content.is_conversation:
        plain = [{"role": message["role"], "content": message.get("content")} for message in prompt + completion]
        return cells | {"messages": plain}
    return cells | ({"text": completion} if row.kind == "text" else {"prompt": prompt, "completion": completion})
