"""Which files of a folder belong to which split, by the Hub's conventions."""

import re
from collections.abc import Callable
from pathlib import Path

import yaml

SPLITS = ("train", "validation", "test")
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation", "heldout", "holdout"),
    "test": ("test", "testing"),
}
# Files that the Hub and `save_to_disk` put beside rows.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
# Files of a model or of a run. A folder below the data folder that holds one is not data.
NO_DATA = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "trainer_state.json")
NO_DATA += ("metrics.jsonl", "skipped_rows.jsonl", "cut_rows.jsonl")


def named_split(name: str) -> str | None:
    """The split that a name states: "train-00000-of-00001", "my_test_set" or "Validation"; None if it states none.

    Raises:
        ValueError: the name states two splits.
    """
    found = _stated(name)
    if len(found) > 1:
        raise ValueError(f"the name {name!r} states two splits, {' and '.join(found)}: rename it")
    return found[0] if found else None


def _stated(name: str) -> list[str]:
    separated = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    words = re.split(r"[^a-z]+", re.sub(r"held[-_ ]out|hold[-_ ]out", "heldout", separated))
    bare = {word for long in words for word in (long, re.sub(r"(s|set|data|split)$", "", long))}
    return [split for split in SPLITS if bare & set(WORDS[split])]


def split_of(path: Path) -> str | None:
    """The split of a file, by its path in the data folder: its own name decides with the names of its folders.

    Raises:
        ValueError: two of the names state different splits.
    """
    try:
        found = {split for name in (*path.parts[:-1], path.name.partition(".")[0]) if (split := named_split(name))}
    except ValueError as error:
        raise ValueError(f"{path}: {error}, or give `--data_path` the file itself") from None
    if len(found) > 1:
        raise ValueError(
            f"{path} states two splits, {' and '.join(sorted(found))}: rename it, or give `--data_path` the file itself"
        )
    return found.pop() if found else None


def chosen_splits(names: list[str]) -> dict[str, str]:
    """Which of a dataset's splits are read as what, by their names: {"train_sft": "train"}.

    Raises:
        ValueError: no split is a training split, or two are.
    """
    chosen: dict[str, str] = {}
    for split in SPLITS:
        exact = [name for name in names if name.lower() in WORDS[split]]
        similar = exact or [name for name in names if _stated(name) == [split]]
        if len(similar) > 1 and split == "train":
            raise ValueError(f"several splits could be trained on, {', '.join(similar)}: save one of them to a file")
        chosen |= dict.fromkeys(similar, split)
    if "train" not in chosen.values():
        raise ValueError(f"there is no split `train`, only {', '.join(names)}")
    return chosen


def files_by_split(
    folder: Path, suffixes: tuple[str, ...], suffix: Callable[[Path], str]
) -> tuple[dict[str, list[Path]], list[Path]]:
    """The data files of a folder by split, and the files that are not read. `suffix` gives that of a file.

    A file that names no split is of the training split. README.md may list the files, as on the Hub.

    Raises:
        ValueError: there is nothing to train on, or a file cannot be given to one split.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder)))
    if listed := _listed(folder):
        splits = {split: [path for path in files if path in paths] for split, paths in listed.items()}
    else:
        elsewhere = {path.parent for path in files if path.name in NO_DATA} - {folder}
        data = [
            path
            for path in files
            if suffix(path) in suffixes
            and path.name.lower() not in (*METADATA, *NO_DATA)
            and elsewhere.isdisjoint(path.parents)
        ]
        # Text beside rows with columns is a readme or a licence more often than it is data.
        if any(suffix(path) != ".txt" for path in data):
            data = [path for path in data if suffix(path) != ".txt"]
        splits = {}
        for path in data:
            splits.setdefault(split_of(path.relative_to(folder)) or "train", []).append(path)
    read = [path for paths in splits.values() for path in paths]
    if not read:
        raise ValueError(f"`--data_path` {folder} holds no file with one of the suffixes {', '.join(suffixes)}")
    if not splits.get("train"):
        names = ", ".join(str(path.relative_to(folder)) for path in read)
        raise ValueError(f"`--data_path` {folder} has no training rows, only {names}")
    metadata = {*METADATA, "readme.md", "license", "license.txt"}
    return splits, [path for path in files if path not in read and path.name.lower() not in metadata]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _listed(folder: Path) -> dict[str, set[Path]]:
    """The files by split that the `configs` of a README.md list; empty if it lists none."""
    readme = folder / "README.md"
    parts = readme.read_text(encoding="utf-8-sig", errors="replace").split("---\n", 2) if readme.is_file() else []
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise ValueError(f"the header of {readme} is not YAML: {error}") from None
    configs = header.get("configs") if isinstance(header, dict) else None
    configs = [one for one in configs or [] if isinstance(one, dict)]
    if len(configs) > 1:
        default = [one for one in configs if one.get("default") or one.get("config_name") == "default"]
        if len(default) != 1:
            names = ", ".join(str(one.get("config_name")) for one in configs)
            raise ValueError(f"{readme} lists several configurations, {names}: give `--data_path` the folder of one")
        configs = default
    if configs and not configs[0].get("data_files") and (own := configs[0].get("data_dir")):
        raise ValueError(f"{readme} says that the rows are in {own}: give `--data_path` that folder")
    return _files_of(folder, configs[0]) if configs and configs[0].get("data_files") else {}


def _files_of(folder: Path, config: dict) -> dict[str, set[Path]]:
    """The files of one configuration; `data_files` is a pattern, patterns, or patterns by split."""
    entries = config["data_files"]
    if isinstance(entries, dict):
        entries = [{"split": split, "path": path} for split, path in entries.items()]
    entries = [entries] if isinstance(entries, str) else entries
    named = [one if isinstance(one, dict) else {"split": "train", "path": one} for one in entries]
    chosen = chosen_splits([str(one.get("split")) for one in named])
    files: dict[str, set[Path]] = {}
    for entry in named:
        if (split := chosen.get(str(entry.get("split")))) is None:
            continue
        patterns = entry.get("path")
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            try:
                found = set(folder.glob(pattern))
            except (TypeError, ValueError, NotImplementedError):  # no text, an empty one, or an absolute path
                found = set()
            if not found:
                raise ValueError(f"{folder / 'README.md'} lists {pattern!r}, but the folder has no such file")
            files.setdefault(split, set()).update(found)
    return files
