"""The folder of a day: what was measured, what is left, what is running; whole at any moment it may be cut at."""

import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

from ..installation import ROOT

STATE, RESULTS, REPORT, THRESHOLDS = "day.json", "results.jsonl", "report.md", "thresholds.json"
TESTS, LOG, KERNELS, PART = "tests.xml", "log.txt", "kernels.tar.gz", ".part"
FILES = (STATE, RESULTS, REPORT, THRESHOLDS, TESTS, LOG, KERNELS, PART)
"""No others, and no folders: a machine that is lent may hand back only so many."""
NEEDED = (".json", ".cubin", ".so")
"""Of what Triton keeps for a compiled kernel, the files that it loads it from. The rest is for reading."""


class Folder:
    """`state` is what `day.json` holds, by name; `save` writes it."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        fresh = {
            "commit": None,
            "device": None,
            "capability": None,
            "slices": [],
            "steps": {},
            "running": None,
            "deaths": [],
        }
        self.state: dict = fresh | (json.loads((path / STATE).read_text()) if (path / STATE).exists() else {})

    def save(self) -> None:
        """Writes the state."""
        self.write(STATE, json.dumps(self.state, indent=1) + "\n")

    def write(self, name: str, content: str | bytes) -> None:
        """The file whole, or as it was before."""
        part = self.path / PART
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, self.path / name)

    def log(self, text: str) -> None:
        """Adds to the log."""
        with (self.path / LOG).open("a") as file:
            file.write(text)

    def step(self, name: str) -> dict:
        """What is known of a step: seconds spent, cases done, left and failed, and whether nothing is left to do."""
        fresh = {"seconds": 0.0, "cases": 0, "left": None, "failed": 0, "done": False, "cost": ""}
        return self.state["steps"].setdefault(name, fresh)

    def begin(self, step: str, command: str, case: dict) -> None:
        """Notes what is running, so that it can be said what ended a process that cannot say it."""
        self.state["running"] = {"step": step, "command": command, "case": case, "since": time.time()}
        self.save()

    def end(self) -> None:
        """Notes that it is over."""
        self.state["running"] = None
        self.save()

    def clean(self) -> None:
        """Removes what a cut left half written."""
        (self.path / PART).unlink(missing_ok=True)

    def pack_kernels(self, cache: Path) -> None:
        """Keeps what Triton compiled."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as archive:
            for file in sorted(cache.rglob("*")):
                if file.suffix in NEEDED and file.is_file():
                    archive.add(file, file.relative_to(cache))
        self.write(KERNELS, packed.getvalue())

    def unpack_kernels(self, cache: Path) -> None:
        """Gives Triton what an earlier slice compiled, perhaps on another machine."""
        cache.mkdir(parents=True, exist_ok=True)
        if (self.path / KERNELS).exists():
            with tarfile.open(self.path / KERNELS) as archive:
                archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 has none
                archive.extractall(cache)


def cache_of(rehearsed: bool) -> Path:
    """Where Triton compiles to: always the same place, for its files name each other by their whole paths."""
    return Path(tempfile.gettempdir()) / "dora-kernels-day" / ("rehearsed" if rehearsed else "compiled")


def commit_of_tree() -> str:
    """The commit; where there is none, or files differ from it, what tells this tree's sources from others'."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "dora_kernels", "bench", "tests")
    if head and not changed:
        return head
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("dora_kernels", "bench") for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return "-".join(filter(None, [head, f"sources-{digest.hexdigest()[:12]}"]))


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
