"""Rows of one file: CSV, JSON, JSON lines, Parquet or plain text.

A row that cannot be read becomes a `SourceRow` with the reason in place of its values.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from pyarrow import parquet

from .kinds import is_row
from .splits import SPLITS, named_split


@dataclass(frozen=True)
class SourceRow:
    """One row: its place, and its values or the problem that kept them from being read."""

    place: str  # "rows.jsonl, row 3"
    values: dict | None
    problem: str | None = None
    weight: float = 1  # of its source (`mixture`)


def read_file(path: Path, name: str) -> dict[str | None, list[SourceRow]]:
    """The rows of a file by split; rows of a file that does not name splits itself are under None.

    Args:
        name: the file's name in the places of its rows.

    Raises:
        ValueError: the file as a whole cannot be read; the message names it and what to do.
    """
    reader = READERS.get(suffix_of(path))
    if reader is None:
        raise ValueError(f"`--data_path` {path} should end in one of {', '.join(READERS)}")
    found = reader(path, name.encode(errors="replace").decode())
    return found if isinstance(found, dict) else {None: list(found)}


def suffix_of(path: Path) -> str:
    """What a file's name says of its content: ".jsonl" for "rows.JSONL.gz"."""
    return (Path(path.stem) if path.suffix.lower() == GZIP else path).suffix.lower()


def decoded(path: Path) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32, without its byte order mark.

    Bytes that are not UTF-8 become lone surrogates, which no valid text holds. So `problem_of` can name their row.
    """
    content = path.read_bytes()
    if path.suffix.lower() == GZIP:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a readable gzip file ({error}): write or download it again") from None
    # Text in UTF-16 has NUL bytes in its line ends. Without any, what looks like its mark is a damaged UTF-8 row.
    encoding = json.detect_encoding(content) if b"\0" in content else "utf-8"
    if encoding.startswith("utf-8"):
        return content.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid {encoding.upper()} ({error}): save it as UTF-8") from None


def numbered(name: str, values) -> Iterator[SourceRow]:
    """Rows numbered from 1."""
    for number, value in enumerate(values, 1):
        yield _row(f"{name}, row {number}", value)


def table_rows(name: str, values: Iterable[dict]) -> Iterator[SourceRow]:
    """Rows of an Arrow table, numbered from 1. Its structs have the fields of all rows' structs, as null: those that a
    row does not fill are left out."""
    return numbered(name, ({column: _filled(value) for column, value in row.items()} for row in values))


def _filled(value):
    if isinstance(value, list):
        return [_filled(each) for each in value]
    if isinstance(value, dict):
        return {name: _filled(each) for name, each in value.items() if each is not None}
    return value


def _row(place: str, value) -> SourceRow:
    if isinstance(value, dict):
        return SourceRow(place, value)
    return SourceRow(place, None, f"expected an object with columns, got {type(value).__name__}")


def _read_text(path: Path, name: str) -> Iterator[SourceRow]:
    for number, line in _lines(decoded(path)):
        yield SourceRow(f"{name}, row {number}", {"text": line})


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, numbered from 1. A byte order mark inside is of files that were joined."""
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if (line := line.removeprefix("\ufeff")).strip():
            yield number, line


# JSON


def _read_json(path: Path, name: str) -> Iterator[SourceRow] | dict[str, list[SourceRow]]:
    """An array of rows, one row a line, one row alone, or an object that holds arrays of rows."""
    text = decoded(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = list(_lines(text))
        if suffix_of(path) == ".json" and lines and not _parses(lines[0][1]):
            raise ValueError(
                f"{path} is not valid JSON ({_reason(error)}): it should hold an array of rows, or one row a line"
            ) from None
        return (_json_row(f"{name}, row {number}", line) for number, line in lines)
    if isinstance(values, list):
        return numbered(name, values)
    if isinstance(values, dict):
        return _json_object(path, name, values)
    raise ValueError(f"{path} should hold an array of rows, or one row a line, got {type(values).__name__}")


def _json_object(path: Path, name: str, values: dict) -> Iterator[SourceRow] | dict[str, list[SourceRow]]:
    arrays = {key: value for key, value in values.items() if _is_array_of_rows(value)}
    if is_row(values) or not arrays:
        return numbered(name, [values])
    splits = {key: named_split(key) for key in arrays}
    if all(splits.values()) and len(set(splits.values())) == len(splits):
        return {splits[key]: list(numbered(f"{name} [{key}]", rows)) for key, rows in arrays.items()}
    if len(arrays) > 1:
        raise ValueError(
            f"{path} holds several arrays of rows, {', '.join(arrays)}: keep one of them in a file, or name them "
            f"{', '.join(SPLITS)}"
        )
    return numbered(name, *arrays.values())


def _is_array_of_rows(value) -> bool:
    return isinstance(value, list) and any(isinstance(row, dict) for row in value)


def _json_row(place: str, line: str) -> SourceRow:
    try:
        return _row(place, json.loads(line))
    except (ValueError, RecursionError) as error:
        escaped = any("\udc80" <= character <= "\udcff" for character in line)
        return SourceRow(place, None, "not UTF-8" if escaped else f"not valid JSON ({_reason(error)})")


def _parses(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


# CSV


def _read_csv(path: Path, name: str) -> Iterator[SourceRow]:
    """Rows of a CSV file with a header, delimited by a comma, a semicolon or a tab."""
    text = decoded(path)
    with _long_fields():
        try:
            header, delimiter = _header_and_delimiter(text, suffix_of(path))
        except csv.Error as error:
            raise ValueError(f"{path}: the header is not valid CSV ({error})") from None
        if repeated := [column for column in header if column and header.count(column) > 1]:
            raise ValueError(f"{path} has two columns named {repeated[0]!r}: rename one of them")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        next(reader, None)
        rows: list[SourceRow] = []
        while True:
            place, first_line = f"{name}, row {len(rows) + 1}", reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return iter(rows)
            except csv.Error as error:
                if reader.line_num > first_line or "unexpected end" in str(error):
                    raise ValueError(
                        f"{path}: lines {first_line} to {reader.line_num} would be one row, as a quote in line "
                        f"{first_line} is not closed ({error}): close it, or double a quote inside a quoted field"
                    ) from None
                rows.append(SourceRow(place, None, f"not valid CSV ({error})"))
                continue
            if fields:  # a blank line has none
                rows.append(_csv_row(place, header, fields))


def _header_and_delimiter(text: str, suffix: str) -> tuple[list[str], str]:
    """The column names, and the first delimiter that finds known ones; else the one that finds the most."""
    delimiters = "\t,;" if suffix == ".tsv" else ",;\t"
    headers = {
        delimiter: [
            column.strip() for column in next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        ]
        for delimiter in delimiters
    }
    known = next((delimiter for delimiter in delimiters if is_row(dict.fromkeys(headers[delimiter]))), None)
    known = known or max(delimiters, key=lambda delimiter: len(headers[delimiter]))
    return headers[known], known


def _csv_row(place: str, header: list[str], fields: list[str]) -> SourceRow:
    if len(fields) > len(header):
        return SourceRow(
            place, None, f"has {len(fields)} fields for {len(header)} columns: quote a field that holds the delimiter"
        )
    values = dict(zip(header, fields))
    return SourceRow(place, {column: values.get(column) for column in header if column})


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lifts csv's limit of 128 KiB a field, which it has for the whole process."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


# Parquet


def _read_parquet(path: Path, name: str) -> Iterator[SourceRow]:
    try:
        with parquet.ParquetFile(path) as file:
            return table_rows(name, file.read().to_pylist())
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a readable Parquet file ({reason}): write or download it again") from None


GZIP = ".gz"
READERS = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet, ".txt": _read_text}
READERS |= {".tsv": _read_csv, ".ndjson": _read_json}
