"""Which files of a folder are trained on: the Hub's names and folders, `save_to_disk`, and lists in README.md."""

import json

import datasets
import pytest

from training.data.sources import read_source
from training.data.splits import chosen_splits, named_split

ROWS = [{"text": f"text {number}"} for number in range(6)]


def write(path, rows=ROWS[:1]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def places(source):
    return {split: [row.place for row in rows] for split, rows in source.splits.items()}


@pytest.mark.parametrize(
    "name, split",
    [
        ("train", "train"),
        ("train-00000-of-00001", "train"),
        ("my_training data", "train"),
        ("trainset", "train"),
        *(
            (name, "validation")
            for name in ("validation", "valid", "val", "dev", "eval", "VALID", "dev.v2", "held-out")
        ),
        *((name, "validation") for name in ("gsm8k_evaluation", "devset", "evals")),
        *((name, "test") for name in ("test", "test-00000-of-00003", "a.test", "Testing", "myTestData", "test_2")),
        *((name, None) for name in ("rows", "contest", "latest", "trainer", "evaluator", "part-0001", "devices")),
    ],
)
def test_names_that_state_a_split(name, split):
    assert named_split(name) == split


@pytest.mark.parametrize("name", ["train_test_split", "train-eval", "test-of-validation"])
def test_a_name_that_states_two_splits_is_refused(name):
    with pytest.raises(ValueError, match=f"the name '{name}' states two splits"):
        named_split(name)


def test_a_hub_folder(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"):
        write(tmp_path / "data" / f"{name}.jsonl")
    (tmp_path / "dataset_info.json").write_text(
        '{"features": {"text": {"dtype": "string"}}, "splits": [{"name": "a"}]}'
    )
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Rows\n")
    write(tmp_path / ".cache" / "huggingface" / "train.jsonl")
    source = read_source(str(tmp_path))
    assert places(source) == {
        "train": [f"data/train-0000{part}-of-00002.jsonl, row 1" for part in (0, 1)],
        "validation": ["data/validation-00000-of-00001.jsonl, row 1"],
        "test": ["data/test-00000-of-00001.jsonl, row 1"],
    }
    assert source.notes == [
        "train: data/train-00000-of-00002.jsonl, data/train-00001-of-00002.jsonl",
        "validation: data/validation-00000-of-00001.jsonl",
        "test: data/test-00000-of-00001.jsonl",
    ]


def test_a_folder_for_each_split(tmp_path):
    for name in ("train/0.jsonl", "val/part/0.jsonl", "TEST/0.jsonl", "more.jsonl"):
        write(tmp_path / name)
    found = places(read_source(str(tmp_path)))
    assert found["train"] == ["more.jsonl, row 1", "train/0.jsonl, row 1"]
    assert found["validation"] == ["val/part/0.jsonl, row 1"] and found["test"] == ["TEST/0.jsonl, row 1"]


def test_the_data_folder_itself_and_a_file_may_have_any_name(tmp_path):
    write(tmp_path / "test" / "rows.jsonl")
    assert list(read_source(str(tmp_path / "test")).splits) == ["train"]
    assert list(read_source(str(tmp_path / "test" / "rows.jsonl")).splits) == ["train"]


@pytest.mark.parametrize("name", ["train-test.jsonl", "train/test_questions.jsonl", "test/train.jsonl"])
def test_a_file_of_two_splits_is_refused(tmp_path, name):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}.*states two splits.* give `--data_path` the file itself"):
        read_source(str(tmp_path))


def test_a_folder_of_test_rows_alone_is_refused(tmp_path):
    write(tmp_path / "data" / "test-00000-of-00001.jsonl")
    with pytest.raises(ValueError, match=r"has no training rows, only data/test-00000-of-00001\.jsonl"):
        read_source(str(tmp_path))


def test_files_that_are_no_rows_are_not_read_and_named(tmp_path):
    write(tmp_path / "rows.jsonl")
    for name in ("notes.txt", "table.xlsx", "LICENSE", "README.md"):
        (tmp_path / name).write_text("text")
    source = read_source(str(tmp_path))
    assert places(source) == {"train": ["rows.jsonl, row 1"]}
    assert source.notes == ["not read: notes.txt, table.xlsx"]
    (tmp_path / "rows.jsonl").unlink()
    assert places(read_source(str(tmp_path))) == {"train": ["notes.txt, row 1"]}


def test_a_model_or_a_run_in_the_folder_is_no_data(tmp_path):
    for name in ("rows.jsonl", "metrics.jsonl", "out/metrics.jsonl", "out/checkpoint-2/manifest.json"):
        write(tmp_path / name)
    for name in ("base/config.json", "base/vocab.json", "out/adapter_config.json", "more/rows.json"):
        write(tmp_path / name)
    source = read_source(str(tmp_path))
    assert places(source) == {"train": ["more/rows.json, row 1", "rows.jsonl, row 1"]}
    assert "base/vocab.json" in source.notes[1] and "out/checkpoint-2/manifest.json" in source.notes[1]


# Lists in README.md


def readme(folder, text):
    (folder / "README.md").write_text(f"---\nconfigs:\n{text}---\n")


@pytest.fixture
def listed(tmp_path):
    for name in ("a/first.jsonl", "a/second.jsonl", "b/third.jsonl", "b/fourth.jsonl"):
        write(tmp_path / name)
    return tmp_path


def test_a_readme_may_list_the_files(listed):
    readme(
        listed, "- config_name: default\n  data_files:\n  - {split: train, path: a/*}\n  - {split: test, path: b/th*}\n"
    )
    source = read_source(str(listed))
    assert places(source) == {
        "train": ["a/first.jsonl, row 1", "a/second.jsonl, row 1"],
        "test": ["b/third.jsonl, row 1"],
    }
    assert "not read: b/fourth.jsonl" in source.notes
    readme(listed, "- config_name: x\n  data_files: b/*.jsonl\n")
    assert places(read_source(str(listed))) == {"train": ["b/fourth.jsonl, row 1", "b/third.jsonl, row 1"]}


def test_one_of_several_configurations_must_be_the_default(listed):
    two = "- config_name: x\n  data_files: a/*\n- config_name: y\n  data_files: b/*\n"
    readme(listed, two)
    with pytest.raises(ValueError, match="several configurations, x, y: give `--data_path` the folder of one"):
        read_source(str(listed))
    readme(listed, two + "  default: true\n")
    assert places(read_source(str(listed))) == {"train": ["b/fourth.jsonl, row 1", "b/third.jsonl, row 1"]}


@pytest.mark.parametrize(
    "text, message",
    [
        ("- data_files: c/*\n", r"lists 'c/\*', but the folder has no such file"),
        ("- data_files: /a/*\n", r"lists '/a/\*', but the folder has no such file"),
        ("- data_files: [1]\n", "lists 1, but the folder has no such file"),
        ("- data_files: {train: }\n", "lists None, but the folder has no such file"),
        ("- data_files: [{split: test, path: a/*}]\n", "there is no split `train`, only test"),
        ("- config_name: x\n  data_dir: a\n", "says that the rows are in a: give `--data_path` that folder"),
        ("- [\n", "the header of .* is not YAML"),
    ],
    ids=["absent", "absolute", "number", "nothing", "test", "data_dir", "yaml"],
)
def test_a_readme_that_cannot_be_followed(listed, text, message):
    readme(listed, text)
    with pytest.raises(ValueError, match=message):
        read_source(str(listed))


# Datasets of the library


def test_what_save_to_disk_writes(tmp_path):
    split = datasets.Dataset.from_list
    datasets.DatasetDict({"train": split(ROWS[:4]), "test": split(ROWS[4:])}).save_to_disk(tmp_path / "both")
    split(ROWS).select([5, 0]).save_to_disk(tmp_path / "one")
    both, one = (read_source(str(tmp_path / name)) for name in ("both", "one"))
    assert [row.values for row in both.splits["train"]] == ROWS[:4] and both.splits["test"][0].values == ROWS[4]
    assert both.splits["test"][1].place == "both [test], row 2"
    assert [row.values for row in one.splits["train"]] == [ROWS[5], ROWS[0]]
    next((tmp_path / "both" / "train").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is a `save_to_disk` folder that cannot be read"):
        read_source(str(tmp_path / "both"))


@pytest.mark.parametrize(
    "names, chosen",
    [
        (["train", "validation", "test"], {"train": "train", "validation": "validation", "test": "test"}),
        (["train", "train_extra", "dev"], {"train": "train", "dev": "validation"}),
        (["train_sft", "test_sft", "train_test"], {"train_sft": "train", "test_sft": "test"}),
    ],
    ids=["plain", "more", "suffixed"],
)
def test_the_splits_of_a_dataset(names, chosen):
    assert chosen_splits(names) == chosen


@pytest.mark.parametrize(
    "names, message",
    [(["test"], "there is no split `train`, only test"), (["train_a", "train_b"], "several .* train_a, train_b")],
    ids=["none", "two"],
)
def test_a_dataset_without_one_training_split_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        chosen_splits(names)
