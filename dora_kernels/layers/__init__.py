"""Modules: the DoRA layer, what it keeps for inference, what it would run, and which layers it cannot take."""

from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)
"""For signatures: who passes a model of some class gets that class back."""
