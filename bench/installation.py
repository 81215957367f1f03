"""Where this package stands: `bench` in a clone, or `dora_bench`, installed beside `dora_training`."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

PACKAGE = __package__
TRAINING = "dora_training" if PACKAGE == "dora_bench" else "training"
ROOT = Path(__file__).parents[1]
"""The root of the clone; of an installed wheel the folder that holds the packages."""
IS_CLONE = (ROOT / "setup.py").is_file()
RESULTS = Path(__file__).parent / "results"
"""The committed results, which the wheel carries too."""
LOCAL = Path("out") / "bench"
"""Where what is measured here goes, unless a flag says otherwise; git ignores it."""


def training(module: str) -> ModuleType:
    """A module of `training`, "demo" for one, under the name that it has beside this package."""
    return import_module(f"{TRAINING}.{module}")


def spelled() -> str:
    """How the user runs the benchmarks."""
    return "dora-bench" if Path(sys.argv[0]).name == "dora-bench" else f"python -m {PACKAGE}"
