"""The flags of `dora-train`: by group, their checks, the YAML file of `--config`, and parsing."""

from .flags import Flags
from .parsing import parse_flags

__all__ = ["Flags", "parse_flags"]
