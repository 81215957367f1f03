"""Reading the rows of one file, as Excel, Notepad, Windows and exports write them."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from training.data.formats import READERS, read_file

PAIRS = [{"prompt": f"café {number}", "completion": f"a, b; {number}"} for number in range(3)]


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_file(path, path.name)


def rows(path, content):
    """Values, or problems, of a file that names no splits."""
    (found,) = read(path, content).values()
    return [row.problem or row.values for row in found]


def lines(values):
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def csv_text(delimiter=","):
    body = "".join(f'{row["prompt"]}{delimiter}"{row["completion"]}"\n' for row in PAIRS)
    return f"prompt{delimiter}completion\n{body}"


TEXTS = {
    "a.jsonl": lines(PAIRS),
    "a.json": json.dumps(PAIRS),
    "a.csv": csv_text(),
    "a.tsv": csv_text("\t"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", TEXTS)
def test_every_encoding_gives_the_same_rows(tmp_path, name, encoding):
    assert rows(tmp_path / name, TEXTS[name].encode(encoding)) == PAIRS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_text_file_has_no_marks_in_its_rows(tmp_path, encoding):
    text = "one\x0c two\r\n\r\nthree\r\n\ufefffour\n"  # the last is of a file that was appended
    assert rows(tmp_path / "a.txt", text.encode(encoding)) == [{"text": t} for t in ("one\x0c two", "three", "four")]


@pytest.mark.parametrize("suffix", READERS)
def test_suffixes_may_be_in_capitals(tmp_path, suffix):
    path = tmp_path / f"ROWS{suffix.upper()}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
        content = path.read_bytes()
    else:
        content = TEXTS.get(f"a{suffix}", lines(PAIRS))
    assert len(rows(path, content)) == 3


def test_text_that_is_half_in_utf_16_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.csv is not valid UTF-16 .*: save it as UTF-8"):
        read(tmp_path / "a.csv", csv_text().encode("utf-16")[:-1])


# JSON


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_may_be_an_array_or_one_row_a_line_or_one_row(tmp_path, name):
    path = tmp_path / name
    for text in (json.dumps(PAIRS), json.dumps(PAIRS, indent=2), lines(PAIRS), lines(PAIRS).replace("\n", "\r\n")):
        assert rows(path, text) == PAIRS
    assert rows(path, json.dumps(PAIRS[0], indent=2)) == PAIRS[:1]
    assert rows(path, json.dumps({"version": 1, "data": PAIRS})) == PAIRS
    assert rows(path, "") == []


def test_one_conversation_is_a_row_and_not_its_messages(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert rows(tmp_path / "a.json", json.dumps(row)) == [row]


def test_arrays_named_by_split_are_splits(tmp_path):
    found = read(tmp_path / "a.json", json.dumps({"test": PAIRS[:1], "train": PAIRS[1:]}))
    assert [row.values for row in found["train"]] == PAIRS[1:] and [row.values for row in found["test"]] == PAIRS[:1]
    assert found["test"][0].place == "a.json [test], row 1"
    with pytest.raises(ValueError, match="several arrays of rows, first, second"):
        read(tmp_path / "a.json", json.dumps({"first": PAIRS, "second": PAIRS}))


@pytest.mark.parametrize(
    "line, problem",
    [
        ("[" * 100_000, "not valid JSON (nested too deeply)"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON (Exceeds the limit (4300 digits)"),
        ("{", "not valid JSON (Expecting property name"),
        ("[1]", "expected an object with columns, got list"),
        ("null", "expected an object with columns, got NoneType"),
    ],
    ids=["nested", "digits", "half", "list", "null"],
)
def test_a_line_that_is_no_row_is_a_problem_of_its_own(tmp_path, line, problem):
    found = rows(tmp_path / "a.jsonl", lines(PAIRS) + line + "\n" + lines(PAIRS))
    assert found[:3] == found[4:] == PAIRS and found[3].startswith(problem)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, json.dumps(PAIRS[0], indent=1) * 2], ids=["half", "deep", "two"])
def test_json_that_is_neither_says_what_is_read(tmp_path, text):
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON .*: it should hold an array of rows, or one row"):
        read(tmp_path / "a.json", text)


# CSV


def test_long_fields_are_read_and_the_limit_of_the_process_stays(tmp_path):
    import csv

    limit = csv.field_size_limit()
    long = "word " * 60_000
    assert rows(tmp_path / "a.csv", f'text\n"{long}"\nb\n') == [{"text": long}, {"text": "b"}]
    assert csv.field_size_limit() == limit


def test_what_excel_writes(tmp_path):
    text = '\ufeffprompt;completion\r\n"two\r\nlines";"a ""b"" c"\r\n\r\nd;e\r\n'
    assert rows(tmp_path / "a.csv", text) == [
        {"prompt": "two\r\nlines", "completion": 'a "b" c'},
        {"prompt": "d", "completion": "e"},
    ]


def test_rows_that_do_not_fit_the_header_are_named(tmp_path):
    found = rows(tmp_path / "a.csv", 'prompt,completion\na,b\nc, d, e\nf\n"g"h,i\nj,k\n')
    assert found[0] == {"prompt": "a", "completion": "b"} and found[4] == {"prompt": "j", "completion": "k"}
    assert found[1] == "has 3 fields for 2 columns: quote a field that holds the delimiter"
    assert found[2] == {"prompt": "f", "completion": None}
    assert found[3].startswith("not valid CSV")


@pytest.mark.parametrize("rest", ["c,d\ne,f\n", 'c,d\n"e",f\n'], ids=["to the end", "to the next quote"])
def test_a_quote_that_swallows_rows_is_refused(tmp_path, rest):
    with pytest.raises(ValueError, match=r"a\.csv: lines 2 to 4 would be one row, as a quote in line 2 is not closed"):
        read(tmp_path / "a.csv", 'prompt,completion\na,"b\n' + rest)


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.csv has two columns named 'text': rename one"):
        read(tmp_path / "a.csv", "text,text,,\na,b,,\n")
    assert rows(tmp_path / "a.csv", "text,,\na,,\n") == [{"text": "a"}], "empty columns at the end are no columns"


# Parquet


@pytest.mark.parametrize("content", [b"", b"PAR1garbage", b"PAR1" + bytes(40) + b"PAR1"], ids=["empty", "cut", "zeros"])
def test_damaged_parquet_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable Parquet file \(.*write or download it again"):
        read(tmp_path / "a.parquet", content)


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path):
    path = tmp_path / "completion=x" / "a.parquet"
    path.parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}]), path)
    assert rows(path, path.read_bytes()) == [{"text": "a"}]
