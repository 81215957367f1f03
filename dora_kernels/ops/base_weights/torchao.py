"""torchao's tensor subclasses, which dequantise themselves."""

from torch import nn

from .library import LibraryWeight


def recognises(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__module__.startswith("torchao.")


def read(module: nn.Module, nf4_parity: bool) -> LibraryWeight:
    weight = module.weight
    return LibraryWeight("torchao", weight.shape, weight.dtype, weight.device, weight.dequantize)
