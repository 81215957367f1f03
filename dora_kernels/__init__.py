"""Fused DoRA layers for PyTorch and Hugging Face models."""

# ruff: noqa: E402
from .versions import require

require("torch>=2.11", "transformers>=5.17")

from .adapter import load_adapter, save_adapter
from .config import DoraConfig
from .explain import explain
from .frozen import frozen_adapters
from .functional import dora_linear
from .linear import DoraLinear
from .merging import merge_dora, unmerge_dora
from .patch import apply_dora

__all__ = [
    "DoraConfig",
    "DoraLinear",
    "apply_dora",
    "dora_linear",
    "explain",
    "frozen_adapters",
    "load_adapter",
    "merge_dora",
    "save_adapter",
    "unmerge_dora",
]
