"""`pytest -m gpu`, a process per file, in the order of what the files protect; results in the form that CI reads.

A file that is cut goes on with the tests that have not passed. Some files run at once: importing takes each of them
longer than its tests do, and nothing here is timed.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..installation import ROOT
from .folder import TESTS, Folder, cache_of
from .step import Done

FILES = {
    "tests/ops/test_gpu.py": "the kernels at Llama's sizes against fp64, bit for bit, in graphs and compiled",
    "tests/ops/test_gpu_paths.py": "odd sizes, layouts, dropout, 4 bits, fp64, a model that learns",
    "tests/ops/test_blocks.py": "addresses beyond 2³¹ elements",
    "tests/ops/test_dora_experts.py": "stacks of experts against fp64, at every routing",
    "tests/ops/test_rounding.py": "dithering: unbiased, the same each time",
    "tests/support/test_buffers.py": "the guard bands that the others rest on",
    "tests/support/test_conftest.py": "compiled kernels, poisoned memory, seeds",
    "tests/support/test_interpreter.py": "that the interpreter of all other machines computes what this GPU does",
}
"""By file, what it protects."""
AT_ONCE = 3
STOPPING = 10.0  # seconds in which pytest writes its results once interrupted
REHEARSED = {"tests/ops/test_gpu.py": "graph or memory or (no_op and 16 and k-v)"}
"""What a rehearsal selects: some tests of a file. All of them are `pytest -m gpu --rehearse-gpu`."""


def total(day) -> int:
    """How many tests there are, about."""
    return 5 if day.rehearsed else 700


def run(day, step, seconds: float) -> Done:
    """Runs the files that are not through, for so many seconds at most."""
    known, deadline = day.folder.step(step.name), time.monotonic() + seconds
    through = known.setdefault("through", [])
    files = [file for file in (REHEARSED if day.rehearsed else FILES) if file not in through]
    suites = read(day.folder)

    def one(file: str) -> tuple[str, bool]:
        left = deadline - time.monotonic() - STOPPING
        if left < STOPPING:
            return file, False
        suite, ended = run_file(file, day.rehearsed, passed_of(suites.get(file)), left)
        if suite is not None:
            suites[file] = joined(suites.get(file), suite)
        return file, ended

    with ThreadPoolExecutor(1 if day.rehearsed else AT_ONCE) as pool:
        for file, ended in pool.map(one, files):
            write(day.folder, suites)
            counts = count(suites.get(file))
            known["cases"] = sum(sum(count(suite).values()) for suite in suites.values())
            print(f"   {file}: {counts}{'' if ended else ', cut'}", flush=True)
            if ended:
                through.append(file)
            day.folder.save()
    failed = sum(count(suite)["failed"] for suite in suites.values())
    return Done(failed - known["failed"], len(files) - len([file for file in files if file in through]))


def run_file(file: str, rehearsed: bool, passed: list[str], seconds: float) -> tuple[ET.Element | None, bool]:
    """The file's results, and whether it ran to its end."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            f"--junitxml={results}",
            "-o",
            "junit_family=xunit1",
        ]
        command += ["-p", "no:randomly", "-p", "no:xdist", file]
        command += ["--rehearse-gpu", "-k", REHEARSED[file]] if rehearsed else []
        command += [f"--deselect={name}" for name in passed]
        # Whether kernels are interpreted is conftest's choice; those that it compiles are not the day's to keep.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(cache_of(rehearsed).parent / "tests")
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            # A shell starts what runs in the background with this signal ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=seconds)
            ended = True
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then writes what it has
            try:
                printed, _ = process.communicate(timeout=STOPPING)
            except subprocess.TimeoutExpired:
                process.kill()
                printed, _ = process.communicate()
            ended = False
        if process.returncode:
            print(
                "\n".join(["", f"   {file} ended with {process.returncode}", *printed.splitlines()[-40:]]), flush=True
            )
        suite = ET.parse(results).getroot().find("testsuite") if results.exists() else None
        # The one that was cut has no name.
        for case in suite.findall("testcase") if suite is not None else ():
            if case.get("name") is None:
                suite.remove(case)
        # 5: every test of it has passed in an earlier slice.
        return suite, ended and process.returncode in (0, 1, 5)


def read(folder: Folder) -> dict[str, ET.Element]:
    """The suites by file."""
    path = folder.path / TESTS
    return {suite.get("name"): suite for suite in ET.parse(path).getroot()} if path.exists() else {}


def write(folder: Folder, suites: dict[str, ET.Element]) -> None:
    """All suites as one file."""
    root = ET.Element("testsuites")
    for file, suite in sorted(suites.items()):
        found = count(suite)
        suite.set("name", file)
        suite.set("tests", str(sum(found.values())))
        for attribute, outcome in (("failures", "failed"), ("skipped", "skipped")):
            suite.set(attribute, str(found[outcome]))
        root.append(suite)
    folder.write(TESTS, ET.tostring(root, encoding="unicode"))


def joined(earlier: ET.Element | None, later: ET.Element) -> ET.Element:
    """The later results, and the earlier ones of tests that did not run again."""
    again = {name_of(case) for case in later.iter("testcase")}
    for case in earlier.iter("testcase") if earlier is not None else ():
        if name_of(case) not in again:
            later.append(case)
    return later


def name_of(case: ET.Element) -> str:
    """As pytest takes it."""
    return f"{case.get('file') or case.get('classname').replace('.', '/') + '.py'}::{case.get('name')}"


def outcome(case: ET.Element) -> str:
    """ "passed", "skipped" or "failed"."""
    found = {child.tag for child in case}
    return "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"


def passed_of(suite: ET.Element | None) -> list[str]:
    """The tests that need not run again."""
    return [name_of(case) for case in suite.iter("testcase") if outcome(case) == "passed"] if suite is not None else []


def count(suite: ET.Element | None) -> dict[str, int]:
    """Tests by outcome."""
    found = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for case in suite.iter("testcase") if suite is not None else ():
        found[outcome(case)] += 1
    return found
