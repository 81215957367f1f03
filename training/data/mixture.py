"""Several sources of one run: what `--data_path` lists, and the weight of each."""

import json
import math
import random
from pathlib import Path
from typing import NamedTuple

from .tokens import Row


class Part(NamedTuple):
    """One source. `weight`: how often a pass over the data visits each of its training rows."""

    path: str
    weight: float = 1
    config: str = ""  # of a data set on the Hub
    split: str = ""


def parts_of(data_path: str, config: str = "", split: str = "") -> list[Part]:
    """The sources of `a.jsonl`, `a.jsonl,b.jsonl=0.5`, or a JSON list of paths and of objects with `Part`'s fields.

    Args:
        config, split: of every part that does not name its own.

    Raises:
        ValueError: a part that is neither, or a weight that is no number above 0.
    """
    if data_path.startswith("["):
        try:
            listed = json.loads(data_path)
        except ValueError as error:
            raise ValueError(f"`--data_path` {data_path} is not a JSON list: {error}") from None
    elif "," in data_path and not Path(data_path).exists():
        listed = [_weighted(part.strip()) for part in data_path.split(",")]
    else:
        listed = [data_path]
    found = [_part({"path": one} if isinstance(one, str) else one, config, split) for one in listed]
    for part in found:
        if not 0 < part.weight < math.inf:
            raise ValueError(f"`--data_path` {part.path}: the weight should be above 0, got {part.weight}")
    return found


def mixed(train: list[Row], seed: int) -> list[Row]:
    """The training rows, each as often as the weight of its source says; of a fraction a random part, by `seed`."""
    rows: list[Row] = []
    for weight in dict.fromkeys(row.weight for row in train):
        own = [row for row in train if row.weight == weight]
        whole = int(weight)
        part = random.Random(f"{seed}/{weight}").sample(range(len(own)), round((weight - whole) * len(own)))
        rows += own * whole + [own[index] for index in sorted(part)]
    return rows


def _weighted(text: str) -> dict:
    path, equals, weight = text.rpartition("=")
    try:
        return {"path": path, "weight": float(weight)} if equals and not Path(text).exists() else {"path": text}
    except ValueError:
        return {"path": text}


def _part(fields, config: str, split: str) -> Part:
    if not isinstance(fields, dict) or not isinstance(fields.get("path"), str) or fields.keys() - set(Part._fields):
        raise ValueError(
            f"`--data_path` should list paths, or objects with {', '.join(Part._fields)}, got {json.dumps(fields)}"
        )
    try:
        weight = float(fields.get("weight", 1))
    except (TypeError, ValueError):
        raise ValueError(
            f"`--data_path` {fields['path']}: the weight should be a number, got {fields['weight']!r}"
        ) from None
    return Part(fields["path"], weight, str(fields.get("config") or config), str(fields.get("split") or split))
