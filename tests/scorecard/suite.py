"""Running some of our own tests in a process of their own, for rows whose cases are tests."""

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.peft_suite.__main__ import read

ROOT = Path(__file__).parents[2]
NOT_RUN = "not run (needs a GPU)"


def outcomes(*words: str, root: Path = ROOT, timeout: float = 3600) -> dict[str, str]:
    """{test: "passed", "skipped", "failed" or "not loaded"} of `pytest *words`, run in the tree `root`."""
    return outcomes_and_counts(*words, root=root, timeout=timeout)[0]


def outcomes_and_counts(*words: str, root: Path = ROOT, timeout: float = 3600) -> tuple[dict[str, str], Counter]:
    """`outcomes`, and the sums of the integers that a plugin noted of each test as its properties.

    Raises:
        RuntimeError: no test ran, or pytest itself failed; with its last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        # Slow tests too, unless `words` say otherwise.
        command = [sys.executable, "-m", "pytest", "-q", "--tb=line", f"--junitxml={results}", "-m", "", *words]
        ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=timeout)
        if ended.returncode not in (0, 1) or not results.exists():
            raise RuntimeError(f"pytest {' '.join(words)} ended with {ended.returncode}: {ended.stdout[-2000:]}")
        return read(results)
