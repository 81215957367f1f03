"""The embedded default: a tiny Llama, a task it cannot do, both made by `training.minimal.build_demo`."""

from pathlib import Path

BASE = Path(__file__).parent / "base"
DATA = Path(__file__).parent / "data"
OUTPUT = Path("out/demo")

# Matrices this small gain nothing from a second thread, and on a busy machine waiting for it costs ten times the work.
# It also makes the numbers the same whatever the number of cores.
THREADS = 1
