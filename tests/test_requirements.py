"""`requirements-oldest.txt` pins what `setup.py` states as the minimum."""

import re
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[1]
# No test imports them.
TOOLS = {"build", "mypy", "ruff"}


def versions(file, pattern):
    return {name: Version(version) for name, version in re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)}


def test_the_oldest_versions_are_the_stated_minima():
    stated = versions("setup.py", r'"([\w-]+)>=([\w.]+)')
    pinned = versions("requirements-oldest.txt", r"^([\w-]+)==([\w.]+)")
    assert pinned == {name: version for name, version in stated.items() if name not in TOOLS}
