"""Which rows are trained on and which are held out for evaluation."""

import random
from collections import defaultdict

from .account import Account
from .tokens import Row

LARGEST_DEFAULT = 500


def split_rows(
    usable: dict[str, list[Row]], val_set_size: float | None, seed: int, account: Account
) -> tuple[list[Row], list[Row]]:
    """Training rows, and the rows of the validation split, of the test split, or held out of the training rows.

    Raises:
        ValueError: nothing is left to train on.
    """
    train = usable.get("train", [])
    if not train:
        raise ValueError(f"`--data_path` {account.data_path} has no usable training rows\n{account.text()}".rstrip())
    held_out = next((split for split in ("validation", "test") if usable.get(split)), None)
    if held_out:
        validation = usable[held_out]
        ignored = f"; --val_set_size {val_set_size} is not used" if val_set_size is not None else ""
        account.notes.append(
            f"{len(train)} training rows; evaluated on the {held_out} split of {len(validation)}{ignored}"
        )
    else:
        size = min(LARGEST_DEFAULT, len(train) // 10) if val_set_size is None else val_set_size
        if 0 < size < 1:
            size = max(1, round(size * len(train)))
        train, validation = hold_out(train, size, seed)
        fewer = f", not {size}: rows with the same tokens stay together" if len(validation) < size else ""
        account.notes.append(f"{len(train)} training rows; {len(validation)} rows held out for evaluation{fewer}")
    for split, rows in usable.items():
        if rows and split not in ("train", held_out):
            account.notes[-1] += f"; {len(rows)} rows of the {split} split are not used"
    if account.skipped:
        account.notes[-1] += f"; {len(account.skipped)} rows left out"
    known = {row.tokens.ids.tobytes() for row in train}
    if seen := sum(row.tokens.ids.tobytes() in known for row in validation):
        account.notes.insert(-1, f"{seen} of the rows to evaluate on are training rows too: their loss says little")
    return train, validation


def hold_out(rows: list[Row], size: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows, drawn by `seed`. Rows with the same tokens stay on one side.

    Raises:
        ValueError: `size` leaves nothing to train on.
    """
    if size >= len(rows):
        raise ValueError(f"`--val_set_size` {size} should be smaller than the data, which has {len(rows)} usable rows")
    equal = defaultdict(list)
    for index, row in enumerate(rows):
        equal[row.tokens.ids.tobytes()].append(index)
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
