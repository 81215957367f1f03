"""Reading training data from a file, a folder, a `save_to_disk` folder or the Hub, row by row and by split."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .formats import READERS, SourceRow, read_file, suffix_of, table_rows
from .mixture import Part
from .splits import SPLITS, chosen_splits, files_by_split

NAMED = 10  # names in a note, at most


@dataclass
class Source:
    """Rows by split ("train", "validation", "test"), and notes for the user."""

    splits: dict[str, list[SourceRow]]
    notes: list[str] = field(default_factory=list)


def read_sources(parts: list[Part]) -> Source:
    """Every row of several sources, each with the weight of its own. `read_source` says what it raises."""
    whole = Source({})
    for part in parts:
        source = read_source(part.path, part.config, part.split)
        whole.notes += source.notes
        for split, rows in source.splits.items():
            whole.splits.setdefault(split, []).extend(replace(row, weight=part.weight) for row in rows)
    if len(parts) > 1:
        whole.notes.append("sources: " + ", ".join(f"{part.path} × {part.weight:g}" for part in parts))
    return whole


def read_source(data_path: str, config: str = "", split: str = "") -> Source:
    """Every row of the data, with its place. A row that cannot be read has a problem in place of its values.

    Args:
        config, split: of a data set on the Hub; "" for none.

    Raises:
        FileNotFoundError, ValueError: there is nothing to read, or a file cannot be read or given to a split.
    """
    path = Path(data_path).expanduser()
    if path.exists() and (config or split):
        raise ValueError(f"`--data_config` and `--data_split` are for a data set on the Hub, but {path} is here")
    if path.is_file():
        found = read_file(path, path.name)
        splits = {split or "train": rows for split, rows in found.items()}
        if "train" not in splits:
            raise ValueError(f"`--data_path` {path} has no training rows, only {', '.join(splits)}")
        return Source(splits)
    if not path.is_dir():
        return _read_hub(data_path, config, split)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _read_saved(path)
    return _read_folder(path)


def _read_folder(folder: Path) -> Source:
    files, unread = files_by_split(folder, tuple(READERS), suffix_of)
    splits: dict[str, list[SourceRow]] = {}
    for split, paths in files.items():
        for path in paths:
            for own, rows in read_file(path, str(path.relative_to(folder))).items():
                splits.setdefault(own or split, []).extend(rows)
    notes = []
    if len(files) > 1 or len(files["train"]) > 1:
        for split in (split for split in SPLITS if split in files):
            notes.append(f"{split}: {_names(files[split], folder)}")
    if unread:
        notes.append(f"not read: {_names(unread, folder)}")
    return Source(splits, notes)


def _names(paths: list[Path], folder: Path) -> str:
    names = [str(path.relative_to(folder)).encode(errors="replace").decode() for path in paths]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _read_saved(folder: Path) -> Source:
    """What `datasets.Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.Dataset):
            return Source({"train": list(table_rows(folder.resolve().name, found))})
        return _named_splits(folder.resolve().name, found)
    except Exception as error:  # damaged files raise errors of many classes
        raise ValueError(f"`--data_path` {folder} is a `save_to_disk` folder that cannot be read: {error}") from None


def _read_hub(name: str, config: str, split: str) -> Source:
    import datasets

    try:
        asked = {name: value for name, value in (("name", config), ("split", split)) if value}
        found = datasets.load_dataset(name, **asked)
    except Exception as error:  # the hub's, the network's and the builder's errors have no common class
        raise ValueError(
            f"`--data_path` {name} is neither here nor readable from the hub: {type(error).__name__}: {error}"
        ) from None
    if split:
        return Source({"train": list(table_rows(f"{name} [{split}]", found))})
    try:
        return _named_splits(name, found)
    except ValueError as error:
        raise ValueError(f"`--data_path` {name}: {error}") from None


def _named_splits(name: str, found: Mapping) -> Source:
    chosen = chosen_splits(list(found))
    splits: dict[str, list[SourceRow]] = {}
    for own, split in chosen.items():
        splits.setdefault(split, []).extend(table_rows(f"{name} [{own}]", found[own]))
    unread = [own for own in found if own not in chosen]
    return Source(splits, [f"splits that are not read: {', '.join(unread)}"] if unread else [])
