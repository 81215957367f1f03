"""Fused DoRA layers for PyTorch and Hugging Face models."""

# ruff: noqa: E402
from .versions import require

require("torch>=2.11", "transformers>=5.17")

from .adapter import load_adapter, save_adapter
from .config import DoraConfig
from .explain import explain
from .frozen import frozen_adapters
from .functional import dora_linear
from .interop import PatchReport, patch_peft, patched_peft, unpatch_peft
from .linear import DoraLinear
from .merging import merge_dora, unmerge_dora
from .patch import apply_dora

__all__ = [
    "DoraConfig",
    "DoraKernelsCallback",
    "DoraLinear",
    "PatchReport",
    "apply_dora",
    "dora_linear",
    "explain",
    "frozen_adapters",
    "load_adapter",
    "merge_dora",
    "patch_peft",
    "patched_peft",
    "save_adapter",
    "unmerge_dora",
    "unpatch_peft",
]


def __getattr__(name: str):
    # Its base class loads transformers' trainer, which takes seconds; who has a trainer has paid them.
    if name == "DoraKernelsCallback":
        from .interop.trainer import DoraKernelsCallback

        return DoraKernelsCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
