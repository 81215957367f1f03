"""Faults of a disk: while something is written under a folder, in one chosen call, and at rest, in one finished file.

with Faults(folder) as counted: write()                      # how many calls there are
with Faults(folder, strike=3, kind="torn"): write()          # the fourth of them fails
"""

import builtins
import errno
import io
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import safetensors.torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

KINDS = ("full", "input/output", "torn")
"""No space when writing begins; an error once all is written; half of what is written first, and then no space."""
CONTENT = ("write", "tensors", "tokenizer")
"""The calls that write content: others cannot be torn."""

NUMBERS = {"full": errno.ENOSPC, "input/output": errno.EIO, "torn": errno.ENOSPC}


class Faults:
    """While open, counts what is done to files under `folder`: opening for writing, syncing, renaming, making and
    removing folders and files, and the writing of safetensors and tokenizers themselves. Call number `strike` fails,
    once; a call that would have done nothing (making a folder that is there) is none.

    `delivered` tells whether it did: of a file that is opened and never written to, no write fails.
    """

    def __init__(self, folder: Path, strike: int = -1, kind: str = "full", before=lambda: None):
        self.folder, self.strike, self.kind, self.before = str(folder.resolve()), strike, kind, before
        self.calls: list[str] = []
        self.delivered = False
        self._patches = ExitStack()

    def __enter__(self) -> "Faults":
        replaced = [(io, "open", self._open), (builtins, "open", self._open)]
        replaced.append((safetensors.torch, "serialize_file", self._serialize))
        replaced.append((PreTrainedTokenizerFast, "_save_pretrained", self._save_tokenizer()))
        replaced.append((shutil, "_USE_CP_SENDFILE", False))  # copies are written by `write`, which can fail
        names = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "remove")
        replaced += [(os, name, self._wrap(name)) for name in names]
        for module, name, function in replaced:
            self._patches.enter_context(mock.patch.object(module, name, function))
        return self

    def __exit__(self, *raised) -> None:
        self._patches.close()

    @property
    def struck(self) -> bool:
        return len(self.calls) > self.strike >= 0

    def error(self) -> OSError:
        """What the failing call raises now."""
        self.delivered = True
        number = NUMBERS[self.kind]
        return OSError(number, os.strerror(number), self.calls[self.strike].partition(" ")[2])

    def _is_struck(self, what: str, path) -> bool:
        """Counts a call; whether it is the one to fail."""
        if not str(path).startswith(self.folder):
            return False
        self.calls.append(f"{what} {path}")
        if hit := len(self.calls) - 1 == self.strike:
            self.before()
        return hit

    def _wrap(self, name: str):
        function = getattr(os, name)

        def called(path, *rest, dir_fd=None, **options):
            if name == "fsync":
                within = os.readlink(f"/proc/self/fd/{path}")
            else:
                folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
                within = os.path.abspath(os.path.join(folder, path))
            does = name == "fsync" or os.path.lexists(within) == (name != "mkdir")
            if does and self._is_struck(name, within):
                raise self.error()
            return function(path, *rest, **options | ({} if dir_fd is None else {"dir_fd": dir_fd}))

        return called

    def _open(self, file, mode="r", *rest, **options):
        opened = OPEN(file, mode, *rest, **options)
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return opened
        path = os.path.abspath(file)
        return Failing(opened, self) if self._is_struck("write", path) else opened

    def _serialize(self, tensors, path, metadata=None):
        struck = self._is_struck("tensors", os.path.abspath(path))
        if not struck or self.kind != "full":
            SERIALIZE(tensors, path, metadata=metadata)
        if struck:
            if self.kind == "torn":  # as versions do that write under the final name
                os.truncate(path, os.path.getsize(path) // 2)
            self.delivered = True
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(NUMBERS[self.kind])}")

    def _save_tokenizer(self):
        """In Rust, which knows no kind of its own for what fails."""
        save = PreTrainedTokenizerFast._save_pretrained

        def called(tokenizer, save_directory, *rest, **options):
            path = os.path.join(os.path.abspath(save_directory), "tokenizer.json")
            struck = self._is_struck("tokenizer", path)
            if not struck or self.kind != "full":
                saved = save(tokenizer, save_directory, *rest, **options)
            if not struck:
                return saved
            if self.kind == "torn":
                os.truncate(path, os.path.getsize(path) // 2)
            self.delivered = True
            raise Exception(f"{os.strerror(NUMBERS[self.kind])} (os error {NUMBERS[self.kind]})")

        return called


OPEN, SERIALIZE = io.open, safetensors.torch.serialize_file


class Failing:
    """An open file whose first `write` fails, or whose `close` does."""

    def __init__(self, file, faults: Faults):
        self._file, self._faults = file, faults

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        if self._faults.kind == "input/output":
            return self._file.write(data)
        if self._faults.kind == "torn":
            self._file.write(data[: len(data) // 2])
        raise self._faults.error()

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def close(self) -> None:
        self._file.close()
        if self._faults.kind == "input/output" and not self._faults.delivered:
            raise self._faults.error()

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def truncated(path: Path, at: int) -> None:
    os.truncate(path, at)


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << at % 8
    path.write_bytes(content)


def zeroed(path: Path, at: int) -> None:
    """As file systems leave blocks that were never written."""
    content = path.read_bytes()
    path.write_bytes(content[:at] + bytes(len(content) - at))


AT_REST = {"truncated": truncated, "flipped": flipped, "zeroed": zeroed}
"""What befalls a finished file, from a byte on or in it."""
PLACES = {"first": lambda size: 0, "middle": lambda size: size // 2, "last": lambda size: size - 1}
