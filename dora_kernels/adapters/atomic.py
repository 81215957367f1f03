"""Atomic writes: after a crash every file is either the old or the new one."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file by one with this text. A symbolic link is replaced itself, not the file that it points to."""
    staged = path.with_name(f"{path.name}.tmp")
    staged.unlink(missing_ok=True)
    with staged.open("x") as file:
        file.write(text)
    sync(staged)
    staged.rename(path)


def remove(path: Path) -> None:
    """Delete a folder with its contents, a file, or a symbolic link without its target."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def move_files(staged: Path, directory: Path, names: Iterable[str]) -> None:
    """Move the files called `names` from `staged`, a folder on the same file system, into `directory`.

    If a move fails, the files replaced so far are restored and the error is raised. The last name needs no backup in
    memory: give the largest file last.
    """
    names, backups = list(names), {}
    for name in names:
        sync(staged / name)
    for name in names[:-1]:
        backups[name] = (directory / name).read_bytes() if (directory / name).is_file() else None
    try:
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / name, directory / name)
    except BaseException:  # an interruption too
        for name, content in backups.items():
            if (staged / name).exists():
                break
            if content is None:
                (directory / name).unlink()
            else:
                (staged / name).write_bytes(content)
                os.replace(staged / name, directory / name)
        raise
    sync(directory)
