"""Documentation: its Python runs, its command lines parse, its links lead somewhere."""

import ast
import importlib
import re
import runpy
import shlex
import warnings
from argparse import ArgumentParser
from itertools import takewhile

import pytest
import yaml
from transformers import HfArgumentParser

from tests.support.doc_blocks import NOT_RUN, PAGES, ROOT, blocks

DOCS = ROOT / "docs"
REAL, TINY = "Qwen/Qwen3-0.6B", str(ROOT / "training/demo/base")
# Blocks that say in their first line why they are not run: those that need the Hub, or a GPU.
LEFT_OUT = 0


def name(page):
    return str(page.relative_to(ROOT))


# Python


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == DOCS], ids=name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """From top to bottom in one namespace, as a reader would, with the embedded model for the real one."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        if block.reason is None:
            code = compile(block.text.replace(REAL, TINY), f"{name(page)}, line {block.line}", "exec")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(code, names)


def test_what_is_not_run_is_counted():
    left_out = [block for page in PAGES for block in blocks(page, "python") if block.reason is not None]
    assert len(left_out) == LEFT_OUT, [(name(block.page), block.line, block.reason) for block in left_out]
    for block in left_out:
        ast.parse(block.text)
    assert not any(NOT_RUN in block.text for page in PAGES for block in blocks(page, "bash"))


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == DOCS], ids=name)
def test_every_page_has_an_example_and_stands_in_the_index(page):
    assert blocks(page, "python") or blocks(page, "bash")
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert page.name == "README.md" or f"]({page.name})" in index


# Command lines


class Strict(ArgumentParser):
    """An error is raised, and not printed before an exit."""

    def error(self, message):
        raise ValueError(message)


def parse_training(module, words):
    if module == "training":
        importlib.import_module("training.flags").parse_flags(words)
        return
    parser = HfArgumentParser(importlib.import_module(module).Flags, allow_abbrev=False)
    parser.parse_args(words)


def parse_bench(words):
    command, *words = words
    assert command in importlib.import_module("bench.__main__").COMMANDS, command
    parser = Strict(allow_abbrev=False)
    importlib.import_module(f"bench.{command}").add_arguments(parser)
    parser.parse_args(words)


def parse(words):
    """Raises, or exits, on a command that does not exist, or a flag that it does not have."""
    if words[0] in ("torchrun", "accelerate"):
        launched = words.index("-m")
        words = ["python", *words[launched:]]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
    elif words[0].startswith("dora-"):
        command = words[0].removeprefix("dora-")
        if command == "bench":
            parse_bench(words[1:])
        else:
            parse_training("training" if command == "train" else f"training.{command}", words[1:])
    elif words[:2] == ["python", "-c"]:
        ast.parse(words[2])
    elif words[:2] == ["python", "-m"]:
        module, words = words[2], words[3:]
        if module.partition(".")[0] in ("training", "dora_training"):
            parse_training(module.removeprefix("dora_"), words)
        elif module == "bench":
            parse_bench(words)
        elif module.startswith("tests."):
            source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in words if word.startswith("--")), words
        else:
            assert module in {"dora_kernels", "pip", "torch.utils.collect_env"}, module
    else:
        assert words[0] in {"pip", "pytest", "pre-commit", ".ci/run"}, words


def commands(page):
    """The command lines of a page's shell blocks, continued lines joined, as words."""
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=name)
def test_the_command_lines_of_a_page_parse(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("base_model: base\ndata_path: data.jsonl\n")
    for words in commands(page):
        parse(words)


@pytest.mark.parametrize(
    "line",
    [
        "python -m training --base_model a --data_path b --learning_rat 1",
        "torchrun --nproc_per_node 2 -m training --nothing",
        "torchrun --nproc_per_node 2 -m dora_training --nothing",
        "python -m training.plan --card",
        "python -m training.export --to gguf --adapter a --output_dir b",
        "python -m bench layer --preset h400",
        "python -m bench speed",
        "dora-train --base_model a --data_path b --learning_rat 1",
        "dora-merge --adapter a",
        "dora-bench layer --preset h400",
        "make coffee",
        "rm -rf out",
    ],
)
def test_a_wrong_command_line_does_not_parse(line):
    with pytest.raises((SystemExit, ValueError, AssertionError)):
        parse(shlex.split(line))


# Links


def anchors(page):
    """GitHub's names for a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        target, _, anchor = link.partition("#")
        if not target.startswith("https://"):
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), link
            assert not anchor or anchor in anchors(path), link


# The shell around the code


def test_the_picture_is_what_its_script_draws():
    draw = runpy.run_path(str(DOCS / "draw_forms.py"))["draw"]
    assert (DOCS / "forms.svg").read_text(encoding="utf-8") == draw()


def pinned(package):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    (version,) = (line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))
    return version


def test_the_hook_formats_as_ci_does():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["rev"] == f"v{pinned('ruff')}"


def test_the_workflow_calls_what_ci_runs():
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]["steps"]
    assert steps[-1]["run"] == "bash .ci/run"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = re.findall(r"^make (?:-j 2 -O )?(.+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    called = [target for line in lines for target in line.split()]
    assert "test" in called and set(called) <= set(targets)


def test_issues_ask_for_what_runs_and_the_versions():
    for file in ("bug.yml", "feature.yml"):
        form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / file).read_text())
        text = str(form["body"])
        assert "explain" in text and "versions" in text.lower(), file


def test_the_citation_is_the_readmes():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for author in citation["preferred-citation"]["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in " ".join(readme.split())


def test_the_tree_names_the_folders_that_there_are():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    tree = list(
        takewhile(lambda line: line.startswith("    ") or not line, text.partition("## The tree\n")[2].split("\n"))
    )
    assert len(tree) <= 30
    named = set(re.findall(r"([a-z_]+)/(?=\s)", "\n".join(tree)))
    there = {
        path.name
        for top in ("dora_kernels", "training", "bench")
        for path in (ROOT / top).rglob("*")
        if (path / "__init__.py").is_file()
    }
    assert there <= named, there - named
