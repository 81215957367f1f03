"""Fused DoRA layers for PyTorch and Hugging Face models."""

from .versions import require

require("torch>=2.11", "transformers>=5.17")

from .functional import dora_linear  # noqa: E402
from .linear import DoraLinear  # noqa: E402

__all__ = ["DoraLinear", "dora_linear"]
