"""Fused DoRA layers for PyTorch and Hugging Face models."""

from .functional import dora_linear
from .linear import DoraLinear

__all__ = ["DoraLinear", "dora_linear"]
