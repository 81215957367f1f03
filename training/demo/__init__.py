"""The embedded default: a tiny Llama, a task it cannot do, and the script that made both (`training.demo.build`)."""

from pathlib import Path

BASE = Path(__file__).parent / "base"
DATA = Path(__file__).parent / "data"
OUTPUT = Path("out/demo")
