"""Atomic checkpoints: a kill at any moment leaves complete checkpoints only.

A checkpoint is a folder `checkpoint-<step>/` of safetensors and JSON files. It is written as `.tmp-<step>-<pid>` on the
same file system. Each file is synced. `manifest.json`, with the size and sha256 of every other file, is written last.
Then the folder is renamed and its parent synced. So a folder with the final name is complete. Loading verifies the
manifest, which detects later damage.

The caller supplies tensors, JSON state and a function that writes the adapter. One process writes to an output folder
at a time.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dora_kernels.adapters.atomic import remove, sync

MANIFEST = "manifest.json"
STATE = "training_state.json"
TENSORS = "training_state.safetensors"


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    state: dict,
    write_adapter: Callable[[Path], None],
    keep: int = 2,
) -> Path:
    """Write `checkpoint-<step>/`, delete all but the `keep` newest sound checkpoints, and return its path.

    Args:
        tensors, state: returned by `load_checkpoint`; `state` holds JSON values.
        write_adapter: `write_adapter(folder)` writes the adapter's files.
    """
    if keep < 1:
        raise ValueError(f"`keep` should be a positive number of checkpoints but the value passed is {keep}")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for leftover in output_dir.glob(".tmp-*"):
        remove(leftover)
    staged = output_dir / f".tmp-{step}-{os.getpid()}"
    staged.mkdir()
    try:
        write_adapter(staged)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, staged / TENSORS)
        (staged / STATE).write_text(json.dumps(state))
        files = {str(path.relative_to(staged)): _describe(path) for path in _files(staged)}
        for name in files:
            sync(staged / name)
        (staged / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
        sync(staged / MANIFEST)
        for folder in (path for path in staged.rglob("*") if path.is_dir()):
            sync(folder)
        sync(staged)
        final, replaced = output_dir / f"checkpoint-{step}", output_dir / f".tmp-replaced-{step}"
        if os.path.lexists(final):  # a damaged one; a folder cannot be renamed over another
            final.rename(replaced)
        try:
            staged.rename(final)
        except OSError:
            if os.path.lexists(replaced):
                replaced.rename(final)
            raise
        sync(output_dir)
    except BaseException:  # a full disk, for one: leave no incomplete folder
        shutil.rmtree(staged, ignore_errors=True)
        raise
    if os.path.lexists(replaced):
        remove(replaced)
    _rotate(output_dir, keep)
    return final


def load_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors (on the CPU) and the JSON state given to `save_checkpoint`."""
    return load_file(Path(path) / TENSORS), json.loads((Path(path) / STATE).read_text())


def newest_checkpoint(output_dir: str | Path, report: Callable[[str], None] = print) -> Path | None:
    """The newest sound checkpoint, or None. Each damaged one that is skipped is passed to `report` as a sentence."""
    for path in list_checkpoints(output_dir):
        reason = damage(path)
        if reason is None:
            return path
        report(f"skipping {path}: {reason}")
    return None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders named `checkpoint-<step>`, highest step first, sound or not."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The optimizer step in a checkpoint folder's name."""
    return int(path.name.removeprefix("checkpoint-"))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, as a sentence, or None if every file matches its manifest."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        if not files:
            return f"{MANIFEST} names no file"
        for name, expected in files.items():
            # The size first: it detects a truncated file without reading it.
            if (size := (path / name).stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes, the manifest says {expected['bytes']}"
            if _describe(path / name) != expected:
                return f"{name} does not match its sha256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:  # a bad block, for one
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is unreadable ({error})"
    return None


def _rotate(output_dir: Path, keep: int) -> None:
    """Delete the checkpoints older than the `keep` newest sound ones."""
    sound = 0
    for path in list_checkpoints(output_dir):
        if sound == keep:
            remove(path)
        elif damage(path) is None:
            sound += 1


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _describe(path: Path) -> dict:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
