"""The contract of checkpoints, under fire: `tests.support.kill_training` with as many points as a test can afford."""

import re
import subprocess
import sys

import pytest

from tests.support.marks import slow


@pytest.mark.parametrize(("kills", "stops"), [(2, 0), slow(4, 1)])
def test_killed_and_stopped_runs_end_with_the_same_bits(kills, stops):
    words = [sys.executable, "-m", "tests.support.kill_training", f"--points={kills}", f"--stops={stops}", "--seed=0"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    killed, stopped = ended.stdout.splitlines()
    number, in_a_save = map(int, re.match(r"SIGKILL points: (\d+), .* in a save: (\d+),", killed).groups())
    assert number >= kills and in_a_save >= 1 and stopped.startswith(f"SIGTERM points: {stops}"), ended.stdout
