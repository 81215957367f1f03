"""Reading training data, row by row, from a hub id, a local file or a folder, so that a bad row can be named.

A row that cannot be read becomes a `Source` row with the reason in place of its values.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyarrow import parquet

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"} | {
    **{"val": "validation", "dev": "validation", "eval": "validation", "test": "test"}
}


@dataclass(frozen=True)
class SourceRow:
    """One row as it was found: where, and its values or why there are none."""

    place: str  # "rows.jsonl, row 3"
    values: dict | None
    problem: str | None = None


def read_source(data_path: str) -> dict[str, list[SourceRow]]:
    """Rows by split ("train", "validation", "test"; only those that the data has).

    Raises FileNotFoundError or ValueError, with what was expected, if there is nothing to read.
    """
    path = Path(data_path)
    if path.is_file():
        splits = {"train": [path]}
    elif path.is_dir():
        splits = _files_by_split(path)
    else:
        return _read_hub(data_path)
    return {split: [row for file in files for row in _read_file(file)] for split, files in splits.items()}


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"`--data_path` {folder} holds no file with one of the suffixes {', '.join(SUFFIXES)}")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(SPLIT_NAMES.get(file.stem, "train"), []).append(file)
    if "train" not in splits:
        raise ValueError(f"`--data_path` {folder} has no training rows, only {', '.join(file.name for file in files)}")
    return splits


def _read_file(path: Path) -> Iterator[SourceRow]:
    if path.suffix == ".parquet":
        yield from _numbered(path.name, parquet.read_table(path).to_pylist())
        return
    if path.suffix not in SUFFIXES:
        raise ValueError(f"`--data_path` {path} should end in one of {', '.join(SUFFIXES)}")
    # Bytes that are not UTF-8 become lone surrogates, which no valid text holds: the row that has them can be named.
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        if path.suffix == ".csv":
            yield from _numbered(path.name, csv.DictReader(file, restkey="columns without a name"))
        elif path.suffix == ".json":
            yield from _numbered(path.name, _json_array(path, file.read()))
        else:
            for number, line in enumerate(file.read().split("\n"), 1):
                if line.strip():
                    place = f"{path.name}, row {number}"
                    yield _json_row(place, line) if path.suffix == ".jsonl" else SourceRow(place, {"text": line})


def _json_row(place: str, line: str) -> SourceRow:
    try:
        return _row(place, json.loads(line))
    except ValueError as error:
        escaped = any("\udc80" <= character <= "\udcff" for character in line)
        return SourceRow(place, None, "not UTF-8" if escaped else f"not valid JSON ({error})")


def _json_array(path: Path, text: str) -> list:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if isinstance(values, dict):  # {"data": [...]}, as some exports have it
        values = next((value for value in values.values() if isinstance(value, list)), None)
    if not isinstance(values, list):
        raise ValueError(f"{path} should hold an array of rows")
    return values


def _numbered(name: str, values) -> Iterator[SourceRow]:
    for number, value in enumerate(values, 1):
        yield _row(f"{name}, row {number}", value)


def _row(place: str, value) -> SourceRow:
    if isinstance(value, dict):
        return SourceRow(place, value)
    return SourceRow(place, None, f"expected an object with columns, got {type(value).__name__}")


def _read_hub(name: str) -> dict[str, list[SourceRow]]:
    import datasets

    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the hub's, the network's and the builder's errors have no common class
        raise ValueError(
            f"`--data_path` {name} is neither here nor readable from the hub: {type(error).__name__}: {error}"
        ) from None
    splits: dict[str, list[SourceRow]] = {}
    for split, rows in found.items():
        if (known := SPLIT_NAMES.get(split)) is not None:
            splits[known] = list(_numbered(f"{name} [{split}]", rows))
    if "train" not in splits:
        raise ValueError(f"`--data_path` {name} has no split `train`, only {', '.join(found)}")
    return splits
