"""bitsandbytes' 8-bit layers (LLM.int8), dequantised by the library."""

import torch
from torch import nn

from .library import LibraryWeight


def recognises(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__name__ == "Int8Params"


def read(module: nn.Module, nf4_parity: bool) -> LibraryWeight:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight = module.weight

    def scales() -> torch.Tensor | None:
        # The first forward of the library's own layer moves them from the weight to the layer's state.
        return weight.SCB if weight.SCB is not None else module.state.SCB

    if scales() is None:
        raise ValueError("this 8-bit weight was not quantised yet: move the model to its device first")

    def dequantize() -> torch.Tensor:
        return int8_vectorwise_dequant(weight.data, scales().to(weight.device))

    return LibraryWeight("bitsandbytes (int8)", weight.shape, torch.float32, weight.device, dequantize)
