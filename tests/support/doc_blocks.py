"""The code blocks of README.md and docs/: read for the tests, and written out for the type checker.

`python -m tests.support.doc_blocks FOLDER` writes the Python blocks of each page to a file of its own.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = "# not run in the tests: "
# README's blocks start from a model that the reader has.
GIVEN = "import transformers\n\nmodel = transformers.AutoModelForCausalLM.from_pretrained('model')\n"


class Block(NamedTuple):
    """A fenced block: where it stands, its language and its text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why the block is not run, as its first line says; None where it is run."""
        first = self.text.split("\n", 1)[0]
        return first.removeprefix(NOT_RUN) if first.startswith(NOT_RUN) else None


def blocks(page: Path, language: str) -> list[Block]:
    """The page's blocks in `language`, from the top."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])
        for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        if found[1] == language
    ]


def write(folder: Path) -> None:
    """Writes `<page>.py` with all Python blocks of each page that has any."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.py"):
        leftover.unlink()
    for page in PAGES:
        if parts := [block.text for block in blocks(page, "python")]:
            given = GIVEN if page.name == "README.md" and page.parent == ROOT else ""
            name = f"{page.relative_to(ROOT).with_suffix('')}".replace("/", "_").replace("-", "_")
            (folder / f"{name}.py").write_text("\n".join([given, *parts]), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
