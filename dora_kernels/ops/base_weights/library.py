"""A weight that only its own library can read."""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch


class LibraryWeight(NamedTuple):
    """A weight [N, K] that its own library dequantises at each use; `format` names both."""

    format: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    dequantize: Callable[[], torch.Tensor]

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def is_packed(self) -> bool:
        return False

    @property
    def note(self) -> str:
        return f"{self.format} dequantises the weight at each use, the rest is fused"

    def readable(self) -> torch.Tensor:
        return self.dequantize()

    def dense(self, dtype: torch.dtype, ops: ModuleType) -> torch.Tensor:
        return self.dequantize().to(dtype)

    def rounding(self, mode: str) -> str:
        return mode
