"""The frozen weight W [out_features, in_features] of a linear layer: a matrix, or a quantised format.

A format is one file and one line of `FORMATS`. Its class has `shape`, `dtype`, `device`, `requires_grad`, and answers:

    readable()          the weight as the operations read it: itself where they decode it, else a matrix
    dense(dtype, ops)   W as a matrix in `dtype`
    rounding(mode)      how W' is rounded where the caller asks for `mode`
    note                what `explain` says of it
    is_packed           whether the operations decode it

The functions here ask the class; for a matrix, a plain tensor, they answer themselves.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn

from . import bitsandbytes_4bit, bitsandbytes_8bit, compressed_tensors, fp8, gptqmodel, hqq, torchao
from .bitsandbytes_4bit import Nf4Weight, of_params4bit
from .compressed_tensors import keep_packed, wrapped_forward
from .fp4 import Fp4Weight
from .fp8 import Fp8Weight
from .fp8_experts import Fp8Stack, is_fp8_experts, read_fp8_stack, why_not_fp8_stack
from .int4 import Int4Weight
from .library import LibraryWeight
from .sharding import sharding_of

__all__ = [
    "FORMATS",
    "Fp4Weight",
    "Fp8Stack",
    "Fp8Weight",
    "Int4Weight",
    "LibraryWeight",
    "Nf4Weight",
    "Packed",
    "Weight",
    "bias_of",
    "dense",
    "is_fp8_experts",
    "is_known_to_peft",
    "is_packed",
    "is_quantized",
    "keep_packed",
    "keep_packing",
    "needs_its_layer",
    "note_of",
    "of_params4bit",
    "read_fp8_stack",
    "readable",
    "sharding_of",
    "stored_rounding",
    "weight_of",
    "why_not_fp8_stack",
    "wrapped_forward",
]

Packed = Nf4Weight | Fp8Weight | Int4Weight | Fp4Weight
"""What the operations decode themselves."""

Weight = torch.Tensor | Packed | LibraryWeight


class Format(NamedTuple):
    """How a layer of a quantised format is recognised by what it carries; no library is imported for that.

    `read(module, nf4_parity)` makes the weight of it. `needs_its_layer`: only the layer itself can be read.
    `is_known_to_peft`: PEFT builds DoRA layers for it.
    """

    recognises: Callable[[nn.Module], bool]
    read: Callable[[nn.Module, bool], Packed | LibraryWeight]
    needs_its_layer: bool
    is_known_to_peft: bool = True


FORMATS = (
    Format(hqq.recognises, hqq.read, needs_its_layer=True),
    Format(bitsandbytes_4bit.recognises, bitsandbytes_4bit.read, needs_its_layer=False),
    Format(bitsandbytes_8bit.recognises, bitsandbytes_8bit.read, needs_its_layer=True),
    Format(fp8.recognises, fp8.read, needs_its_layer=True, is_known_to_peft=False),
    Format(compressed_tensors.recognises, compressed_tensors.read, needs_its_layer=True, is_known_to_peft=False),
    Format(gptqmodel.recognises, gptqmodel.read, needs_its_layer=True, is_known_to_peft=False),
    Format(torchao.recognises, torchao.read, needs_its_layer=False),
)


def weight_of(module: nn.Module, *, nf4_parity: bool = False) -> Weight:
    """The frozen weight [N, K] of a linear layer, as its format is read.

    Raises:
        ValueError: a weight that was not quantised yet, whose scales are on another device or of an unknown shape, or
            that bitsandbytes repacked for inference on a CPU.
    """
    if (found := _format_of(module)) is not None:
        return found.read(module, nf4_parity)
    return module.weight


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is of one of `FORMATS`."""
    return _format_of(module) is not None


def needs_its_layer(module: nn.Module) -> bool:
    """Whether the weight cannot be read without the layer that holds it: HQQ's, FP8, FP4, int4, bitsandbytes'
    in 8 bits."""
    found = _format_of(module)
    return found is not None and found.needs_its_layer


def is_known_to_peft(module: nn.Module) -> bool:
    """Whether PEFT can build a DoRA layer over this one, as far as its weight's format goes."""
    found = _format_of(module)
    return found is None or found.is_known_to_peft


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """The bias of a linear layer as a frozen parameter; some libraries keep it as a buffer."""
    is_buffer = isinstance(module.bias, torch.Tensor) and not isinstance(module.bias, nn.Parameter)
    return nn.Parameter(module.bias, requires_grad=False) if is_buffer else module.bias


def _format_of(module: nn.Module) -> Format | None:
    weight = getattr(module, "weight", None)
    is_dense = type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1
    if is_dense and not fp8.recognises(module):
        return None
    return next((each for each in FORMATS if each.recognises(module)), None)


def readable(weight: Weight) -> torch.Tensor | Packed:
    """The weight as the operations read it; another library's format is dequantised.

    Raises:
        ValueError: this process holds only a part of it.
    """
    if not isinstance(weight, torch.Tensor):
        return weight.readable()
    if sharding := sharding_of(weight):
        raise ValueError(f"the weight is {sharding}")
    return weight


def dense(weight: Weight, dtype: torch.dtype, ops: ModuleType) -> torch.Tensor:
    """W as a matrix in `dtype`: itself where it is one; `ops` decodes packed formats. Raises as `readable`."""
    return readable(weight).to(dtype) if isinstance(weight, torch.Tensor) else weight.dense(dtype, ops)


def stored_rounding(weight: Weight, rounding: str) -> str:
    """How W' is rounded where the caller asks for `rounding`."""
    return rounding if isinstance(weight, torch.Tensor) else weight.rounding(rounding)


def note_of(weight: Weight | Fp8Stack) -> str | None:
    """What a reader of `explain` should know of the weight; None for a matrix."""
    return None if isinstance(weight, torch.Tensor) else weight.note


def is_packed(weight: Weight) -> bool:
    """Whether the operations decode the weight, so that each form writes it out as a matrix once."""
    return not isinstance(weight, torch.Tensor) and weight.is_packed


def keep_packing(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in the first eval forward on a CPU with AVX512-BF16: the engine
    would read the new packing as noise, and gradients would vanish."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
