"""The contract of checkpoints, under fire: `tests.support.kill_training` with as many points as a test can afford."""

import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_killed_and_stopped_runs_end_with_the_same_bits():
    words = [sys.executable, "-m", "tests.support.kill_training", "--points", "4", "--stops", "1", "--seed", "0"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    kills, stops = ended.stdout.splitlines()
    number, in_a_save = map(int, re.match(r"SIGKILL points: (\d+), .* in a save: (\d+),", kills).groups())
    assert number >= 4 and in_a_save >= 1 and stops.startswith("SIGTERM points: 1"), ended.stdout
