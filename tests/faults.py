"""Faults of a disk: while something is written under a folder, in one chosen call, and at rest, in one finished file.

with Faults(folder) as counted: write()                      # how many calls there are
with Faults(folder, strike=3, kind="torn"): write()          # the fourth of them fails
"""

import builtins
import errno
import io
import os
import random
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import safetensors.torch
from safetensors import SafetensorError

KINDS = ("full", "input/output", "torn")
"""No space when writing begins; an error once all is written; half of it written, and then no space."""

NUMBERS = {"full": errno.ENOSPC, "input/output": errno.EIO, "torn": errno.ENOSPC}


class Faults:
    """While open, counts what is done to files under `folder`: opening for writing, syncing, renaming, making and
    removing folders and files, and safetensors' own writing. Call number `strike` fails, once."""

    def __init__(self, folder: Path, strike: int = -1, kind: str = "full", before=lambda: None):
        self.folder, self.strike, self.kind, self.before = str(folder.resolve()), strike, kind, before
        self.calls: list[str] = []
        self._patches = ExitStack()

    def __enter__(self) -> "Faults":
        replaced = [(io, "open", self._open), (builtins, "open", self._open)]
        replaced.append((safetensors.torch, "serialize_file", self._serialize))
        replaced += [
            (os, name, self._wrap(name)) for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")
        ]
        for module, name, function in replaced:
            self._patches.enter_context(mock.patch.object(module, name, function))
        return self

    def __exit__(self, *raised) -> None:
        self._patches.close()

    @property
    def struck(self) -> bool:
        return len(self.calls) > self.strike >= 0

    def error(self) -> OSError:
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
            place = f"/proc/self/fd/{path if name == 'fsync' else dir_fd}"
            within = os.readlink(place) if name == "fsync" or dir_fd is not None else os.path.abspath(path)
            if self._is_struck(name, within):
                raise self.error()
            return function(path, *rest, **options | ({} if dir_fd is None else {"dir_fd": dir_fd}))

        return called

    def _open(self, file, mode="r", *rest, **options):
        opened = OPEN(file, mode, *rest, **options)
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return opened
        path = os.path.abspath(file)
        return Failing(opened, path, self) if self._is_struck("write", path) else opened

    def _serialize(self, tensors, path, metadata=None):
        struck = self._is_struck("tensors", os.path.abspath(path))
        if not struck or self.kind != "full":
            SERIALIZE(tensors, path, metadata=metadata)
        if struck:
            if self.kind == "torn":  # as versions do that write under the final name
                os.truncate(path, os.path.getsize(path) // 2)
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(NUMBERS[self.kind])}")


OPEN, SERIALIZE = io.open, safetensors.torch.serialize_file


class Failing:
    """An open file whose first `write` fails, or whose `close` does."""

    def __init__(self, file, path: str, faults: Faults):
        self._file, self._path, self._faults = file, path, faults
        self._size = os.path.getsize(path)  # not 0 where it is appended to

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        if self._faults.kind == "full":
            raise self._faults.error()
        return self._file.write(data)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def close(self) -> None:
        self._file.close()
        if self._faults.kind == "torn":
            os.truncate(self._path, (self._size + os.path.getsize(self._path)) // 2)
        if self._faults.kind != "full":
            raise self._faults.error()

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def truncated(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def flipped(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def zeroed(path: Path, chance: random.Random) -> None:
    """As file systems leave blocks that were never written."""
    content = path.read_bytes()
    start = chance.randrange(len(content))
    path.write_bytes(content[:start] + bytes(len(content) - start))


def missing(path: Path, chance: random.Random) -> None:
    path.unlink()


AT_REST = {"truncated": truncated, "flipped": flipped, "zeroed": zeroed, "missing": missing}
