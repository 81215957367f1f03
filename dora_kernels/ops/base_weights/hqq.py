"""HQQ's layers, which dequantise themselves."""

import torch
from torch import nn

from .library import LibraryWeight


def recognises(module: nn.Module) -> bool:
    return hasattr(module, "W_q")


def read(module: nn.Module, nf4_parity: bool) -> LibraryWeight:
    shape = torch.Size((module.out_features, module.in_features))
    return LibraryWeight("HQQ", shape, module.compute_dtype, module.W_q.device, module.dequantize)
