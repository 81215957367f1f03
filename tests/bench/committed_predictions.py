"""The committed tables of predictions are what the code of today predicts. `make offline` runs it: it compiles kernels.

python -m pytest -n 0 tests/bench/committed_predictions.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import predict
from bench.counting.gpus import ROOFS
from bench.installation import RESULTS

ROOT = Path(__file__).parents[2]
COMMITTED = RESULTS / "predict-h200.txt"
REWRITE = "if that is meant: python -m bench predict --gpu h200 --output bench/results/predict-h200.txt"
H200 = ROOFS["h200"]


def by_title(sections):
    """Each table by the line above it."""
    return dict(section.strip().split("\n", 1) for section in sections)


PROGRAM = """
import argparse
from itertools import islice
from bench import predict

def sections(*given):
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    return predict.sections(parser.parse_args(["--gpu", "h200", *given]))

some = [*sections("--tables", "kernels", "layer", "--tokens", "8192", "--ranks", "16")][::2]
some += [*islice(sections("--tables", "model", "--ranks", "16"), 1), *sections("--tables", "experts")]
some += [*sections("--tables", "block", "--tokens", "512", "--ranks", "16")][1:]
some += [*islice(sections("--tables", "mixture", "--ranks", "16"), 1)]
print(*some, sep="\\n")
"""


def compiling(*command):
    """Runs Python with kernels that compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_committed_tables_are_what_is_predicted():
    """Of the 60 cases eleven: every second layer at one size, a model's and a mixture's first, those of experts, and a
    block's."""
    head, *committed = COMMITTED.read_text().split("\n\n")
    if predict.versions() not in head:
        pytest.skip(f"other versions than the committed file's may launch something else: {predict.versions()}")
    assert head == predict.header("h200", H200, "nothing was measured"), REWRITE
    committed, found = by_title(committed), by_title(compiling("-c", PROGRAM).split("\n\n"))
    assert len(found) == 11 and len(committed) == 60
    assert "PEFT DoRA fp32 failed: would not fit: 162.5 GiB of 141.0 GiB" in list(found.values())[4]
    for title, table in found.items():
        # A table is equal as a whole or shown as a whole.
        assert table == committed.get(title), f"{title}; {REWRITE}"
