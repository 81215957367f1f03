"""Result rows: JSON lines, each stamped with what was measured on and with; and what a resumed run may skip."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

from ..installation import IS_CLONE, LOCAL, ROOT

LIBRARIES = ("triton", "peft", "transformers", "bitsandbytes", "axolotl", "unsloth")
# What measuring itself writes: it changes no figure.
WRITTEN = ("bench/results", "tests/SCORECARD.md")


def stamp(device: torch.device, commit: str | None = None) -> dict:
    """The machine, the software and the day. `commit` is for a copy of the tree that has no history."""
    driver = (
        _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device.type == "cuda" else ""
    )
    gpu = device.type == "cuda"
    return {
        "kind": "GPU" if gpu else "CPU",
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "threads": None if gpu else torch.get_num_threads(),
        "load": None if gpu else round(os.getloadavg()[0], 2),  # of the last minute, others' work
        "driver": driver.partition("\n")[0] or None,  # one line per GPU, and one driver
        "cuda": torch.version.cuda if gpu else None,
        "torch": torch.__version__,
        **{name: _version(name) for name in LIBRARIES},
        "commit": commit or head(),
        "date": datetime.date.today().isoformat(),
    }


class Records:
    """The rows of one file. A group of rows, one per contestant of a case, is written at once or not at all."""

    def __init__(self, path: Path, stamp: dict):
        self.path, self.stamp = path, stamp
        self._done = {_identity(row) for row in read_rows([path])} if path.exists() else set()

    def has(self, command: str, case: dict) -> bool:
        """Whether this case was measured before, by the same commit on the same machine and software.

        A tree with changes has no commit that would tell one measurement from the next.
        """
        if self.stamp["commit"].endswith(("-changed", "unknown")):
            return False
        return _identity({"command": command, "case": case, "stamp": self.stamp}) in self._done

    def add(self, command: str, case: dict, results: dict[str, dict]) -> None:
        """One row per contestant: `results` by its name."""
        rows = [
            {"command": command, "case": case, "contestant": name, **result, "stamp": self.stamp}
            for name, result in results.items()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # a line that a kill cut short
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._done.update(map(_identity, rows))


def read_rows(paths: Iterable[Path]) -> list[dict]:
    """All rows; a last line that a kill cut short is left out."""
    return [json.loads(line) for path in paths for line in path.read_text().split("\n")[:-1]]


def groups(rows: Iterable[dict]) -> list[dict[str, dict]]:
    """Rows by contestant, one group per case that was measured together; measured again, the newer replaces it."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        machine = {name: row["stamp"][name] for name in ("kind", "device", "threads")}
        key = json.dumps([row["command"], row["case"], machine], sort_keys=True)
        group = found.setdefault(key, {})
        if group and next(iter(group.values()))["stamp"] != row["stamp"]:
            group = found[key] = {}
        group[row["contestant"]] = row
    return list(found.values())


def default_path(stamp: dict) -> Path:
    """out/bench/<device>.jsonl"""
    name = "".join(c if c.isalnum() else "-" for c in stamp["device"].lower()).strip("-")
    return LOCAL / f"{stamp['kind'].lower()}-{name}.jsonl"


def _identity(row: dict) -> str:
    software = {name: value for name, value in row["stamp"].items() if name not in ("date", "load")}
    return json.dumps([row["command"], row["case"], software], sort_keys=True)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def head() -> str:
    """The commit of the working tree, with "-changed" where files differ from it; "unknown" where there is no clone."""
    if not IS_CLONE:  # an environment may stand inside another repository
        return "unknown"
    others = [f":(exclude){path}" for path in WRITTEN]
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return _output("git", "rev-parse", "--short=12", "HEAD") + ("-changed" if changed not in ("", "unknown") else "")


def _output(*command: str) -> str:
    """What a command prints; "unknown" where it is not there or fails, as git does in a copy without history."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
