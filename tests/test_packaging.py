"""What is installed: the sdist is the clone, the wheel brings the commands, and what the quickstart prints works."""

import os
import re
import shlex
import signal
import subprocess
import time
from email import message_from_string
from zipfile import ZipFile

import pytest

import dora_kernels as dk
from tests.support.doc_blocks import ROOT, blocks
from tests.support.environments import built, checked, copied_tree, environment, inside, own_files, unpacked

COMMANDS = {"dora-train", "dora-merge", "dora-export", "dora-plan", "dora-bench"}
REAL, TINY = "Qwen/Qwen3-0.6B", str(ROOT / "training/demo/base")
SECTION = "## From the command line"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The source as the sdist carries it."""
    folder = tmp_path_factory.mktemp("sdist")
    return unpacked(built("sdist", copied_tree(folder / "clone"), folder / "dist"), folder / "unpacked")


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return built("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def binaries(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("environment") / "venv", wheel)


def test_the_sdist_is_the_clone(tree):
    """So that it builds and tests itself."""
    kept = own_files()
    assert len(kept) > 400 and [name for name in kept if not (tree / name).is_file()] == []


def test_what_the_wheel_says_of_itself(wheel):
    with ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        said = message_from_string(archive.read(name).decode())
        scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert said["Version"] == dk.__version__ and said["License-File"] == "LICENSE" and said["Project-URL"]
    assert said.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert set(re.findall(r"^([\w-]+) =", scripts, re.MULTILINE)) == COMMANDS
    assert "Typing :: Typed" in said.get_all("Classifier")
    # No file that is committed shows a speed on a GPU.
    assert not re.search(r"fast|speed|quick|time", said["Summary"], re.IGNORECASE)
    # CUDA builds of torch bring the Triton that they were made for.
    (triton,) = (line for line in said.get_all("Requires-Dist") if line.startswith("triton"))
    assert "==" not in triton.partition(";")[0]


@pytest.mark.slow
def test_the_wheel_is_whole_and_has_one_name_each(binaries, tree, tmp_path):
    said = checked(binaries / "python", ROOT / "tests/support/installed.py", "wheel", tree, cwd=tmp_path)
    assert said.endswith("work from the wheel install\n")


@pytest.mark.slow
def test_an_editable_install_has_one_name_each(tree, tmp_path):
    bin_ = environment(tmp_path / "venv", built("editable", tree, tmp_path / "wheel"))
    said = checked(bin_ / "python", ROOT / "tests/support/installed.py", "editable", tree, cwd=tmp_path)
    assert said.endswith("work from the editable install\n")


def section(language):
    """The blocks of the quickstart's part on the command line, in order."""
    page = ROOT / "docs/quickstart.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    first = lines.index(SECTION) + 1
    last = next(number for number, line in enumerate(lines[first:], first) if line.startswith("## "))
    return [block.text.replace(REAL, TINY) for block in blocks(page, language) if first <= block.line <= last]


def interrupted(words, folder, variables):
    """What a run prints that gets Ctrl-C once it has logged two steps."""
    process = subprocess.Popen(
        words, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A shell starts what runs in the background with this signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    metrics = folder / words[words.index("--output_dir") + 1] / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count('"loss"') < 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_the_quickstart_works_as_printed(binaries, tmp_path):
    """A messy CSV, Ctrl-C, resume, merge, and loading by transformers, by the installed commands alone."""
    variables = inside(binaries) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    variables.pop("PYTHONPATH", None)
    (rows,) = section("python")
    checked(binaries / "python", "-c", rows, cwd=tmp_path, env=variables)
    (text,) = section("bash")
    install, train, *rest = (shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines())
    resume, merge, use = filter(None, rest)
    assert install[:2] == ["pip", "install"] and resume == [*train, "--resume"]
    said = interrupted(train, tmp_path, variables)
    (printed,) = (line.strip() for line in said.splitlines() if line.startswith("  dora-train "))
    assert shlex.split(printed) == resume and "Traceback" not in said
    said = checked(*resume, cwd=tmp_path, env=variables)
    (printed,) = (line.strip() for line in said.splitlines() if line.startswith("  dora-merge "))
    assert "resuming from" in said and set(shlex.split(printed)) >= set(merge)
    checked(*merge, cwd=tmp_path, env=variables)
    assert checked(*use, cwd=tmp_path, env=variables).strip()
    assert os.listdir(tmp_path / merge[merge.index("--output_dir") + 1])
