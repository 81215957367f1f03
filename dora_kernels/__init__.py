"""Fused DoRA layers for PyTorch and Hugging Face models."""

# ruff: noqa: E402
from typing import TYPE_CHECKING

from .versions import __version__, require

require("torch>=2.11", "transformers>=5.17")

from .adapters.save_load import load_adapter, save_adapter
from .config import DoraConfig
from .layers.accumulating import accumulating
from .layers.conv import DoraConv
from .layers.embedding import DoraEmbedding
from .layers.explain import explain
from .layers.frozen import frozen_adapters
from .layers.linear import DoraLinear
from .models.apply import apply_dora
from .models.merge import merge_dora, unmerge_dora
from .models.merged_weights import merged_weights
from .ops.dora_linear import dora_linear
from .peft import PatchReport, patch_peft, patched_peft, unpatch_peft

__all__ = [
    "AccumulatingCallback",
    "DoraConfig",
    "DoraConv",
    "DoraEmbedding",
    "DoraKernelsCallback",
    "DoraLinear",
    "PatchReport",
    "__version__",
    "accumulating",
    "apply_dora",
    "dora_linear",
    "explain",
    "frozen_adapters",
    "load_adapter",
    "merge_dora",
    "merged_weights",
    "patch_peft",
    "patched_peft",
    "save_adapter",
    "unmerge_dora",
    "unpatch_peft",
]

if TYPE_CHECKING:
    from .peft.callback import AccumulatingCallback, DoraKernelsCallback
else:

    def __getattr__(name: str):
        # Their base class loads transformers' trainer, which takes seconds; who has a trainer has paid them.
        if name in ("AccumulatingCallback", "DoraKernelsCallback"):
            from .peft import callback

            return getattr(callback, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
