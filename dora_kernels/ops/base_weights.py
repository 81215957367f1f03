"""Frozen weights that are no plain matrix: NF4, which the engine reads packed, and what only its own library can read.

The libraries are recognised by what their weights carry; none is imported before one of its weights is at hand.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class Nf4Weight(NamedTuple):
    """bitsandbytes' NF4, as it lies in memory: w = code[nibble] · absmax[i // blocksize] in fp32, i the flat index.

    Element i is in byte i // 2, even i in the high nibble. Where the statistics are quantised too,
    absmax = nested_code[absmax] · nested_absmax[block // nested_blocksize] + offset.
    """

    packed: torch.Tensor  # uint8 [⌈N K / 2⌉]
    absmax: torch.Tensor  # [⌈N K / blocksize⌉], fp32, or uint8 where it is quantised
    code: torch.Tensor  # fp32 [16]
    nested_absmax: torch.Tensor | None  # fp32 [⌈blocks / nested_blocksize⌉]
    nested_code: torch.Tensor | None  # fp32 [256]
    offset: torch.Tensor | None  # fp32 []
    shape: torch.Size  # [N, K]
    dtype: torch.dtype  # of the weight that was quantised
    blocksize: int
    nested_blocksize: int
    parity: bool  # round what is decoded to `dtype` first, as PEFT does

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def is_cuda(self) -> bool:
        return self.packed.is_cuda

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def straddles(self) -> bool:
        """Whether a block, or even a byte, holds elements of two output features."""
        return self.shape[1] % self.blocksize > 0

    def element_size(self) -> float:
        """Bytes of one element, its share of the statistics left out."""
        return 0.5


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


Weight = torch.Tensor | Nf4Weight | LibraryWeight


def sharding_of(tensor: Weight) -> str | None:
    """How a tensor is sharded of which this process holds a part at this moment, and what to do; None for a whole one.

    DeepSpeed's ZeRO-3 leaves an empty tensor, and the shape that it has when gathered as `ds_shape`.
    """
    if type(tensor).__name__ == "DTensor":
        return "a DTensor, of which this process holds a part: gather it first, with full_tensor()"
    whole = getattr(tensor, "ds_shape", None)
    if whole is not None and tensor.shape != whole:
        return f"ZeRO-3's part of {list(whole)}: gather it first, with deepspeed.zero.GatheredParameters"
    return None


def readable(weight: Weight) -> torch.Tensor | Nf4Weight:
    """The weight as the engine's operations read it; another library's format is dequantised.

    Raises:
        ValueError: this process holds only a part of it.
    """
    if sharding := sharding_of(weight):
        raise ValueError(f"the weight is {sharding}")
    return weight.dequantize() if isinstance(weight, LibraryWeight) else weight


def stored_rounding(weight: Weight, rounding: str) -> str:
    """How W' is rounded. Decoded NF4 values have no zero bits behind the 16-bit mantissa that a small update could fall
    into: rounding to nearest is unbiased over them already, and a fresh adapter stays an exact no-op."""
    return "nearest" if isinstance(weight, Nf4Weight) and not weight.parity else rounding


def description(weight: Weight) -> str | None:
    """What a reader of `explain` should know of the weight; None for a plain matrix."""
    if isinstance(weight, Nf4Weight):
        return "NF4 is decoded in the same pass" + (", rounded first as PEFT does" if weight.parity else "")
    if isinstance(weight, LibraryWeight):
        return f"{weight.format} dequantises the weight at each use, the rest is fused"
    return None


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer's weight is of a quantised format that `weight_of` knows."""
    weight = getattr(module, "weight", None)
    if type(weight) is nn.Parameter and weight.is_floating_point():
        return False
    return needs_its_layer(module) or type(weight).__name__ == "Params4bit" or _is_torchao(weight)


def needs_its_layer(module: nn.Module) -> bool:
    """Whether the weight cannot be read without the layer that holds it: HQQ's, and bitsandbytes' in 8 bits."""
    return hasattr(module, "W_q") or type(getattr(module, "weight", None)).__name__ == "Int8Params"


def weight_of(module: nn.Module, *, nf4_parity: bool = False) -> Weight:
    """The frozen weight [N, K] of a linear layer (`nn.Linear`, or bitsandbytes', torchao's or HQQ's).

    Raises:
        ValueError: a weight that was not quantised yet, whose scales are on another device, or that bitsandbytes
            repacked for inference on a CPU.
    """
    if hasattr(module, "W_q"):
        shape = torch.Size((module.out_features, module.in_features))
        return LibraryWeight("HQQ", shape, module.compute_dtype, module.W_q.device, module.dequantize)
    weight = module.weight
    if type(weight) is nn.Parameter and weight.is_floating_point():
        return weight
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if type(weight).__name__ == "Params4bit" or state is not None:
        return of_params4bit(weight, state, nf4_parity=nf4_parity)
    if type(weight).__name__ == "Int8Params":
        return _of_int8(module)
    if _is_torchao(weight):
        return LibraryWeight("torchao", weight.shape, weight.dtype, weight.device, weight.dequantize)
    return weight


def of_params4bit(weight: nn.Parameter, state, *, nf4_parity: bool = False) -> Nf4Weight | LibraryWeight:
    """bitsandbytes' 4-bit weight and its `quant_state`: NF4 as the engine reads it, FP4 through the library. Raises as
    `weight_of`."""
    if state is None:
        raise ValueError("this 4-bit weight was not quantised yet: move the model to its device first")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes repacked this 4-bit weight for inference on a CPU, which loses precision: load the model "
            "again, and adapt or patch it before its first forward in eval mode"
        )
    if state.absmax.device != weight.device and not weight.is_meta:
        raise ValueError(
            f"this 4-bit weight is on {weight.device} and its scales on {state.absmax.device}: nn.DataParallel copies "
            "the weight alone; run one process for each GPU (torchrun), or show it one GPU (CUDA_VISIBLE_DEVICES)"
        )
    shape = torch.Size(state.shape)
    if state.quant_type != "nf4":
        from bitsandbytes.functional import dequantize_4bit

        name = f"bitsandbytes ({state.quant_type})"
        return LibraryWeight(name, shape, state.dtype, weight.device, lambda: dequantize_4bit(weight.data, state))
    nested = state.state2 if state.nested else None
    return Nf4Weight(
        weight.data.view(torch.uint8).view(-1),
        state.absmax.view(-1),
        state.code,
        nested.absmax if nested else None,
        nested.code if nested else None,
        state.offset if nested else None,
        shape,
        state.dtype,
        state.blocksize,
        nested.blocksize if nested else 0,
        nf4_parity,
    )


def keep_packing(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in the first eval forward on a CPU with AVX512-BF16: what reads
    the usual packing would read noise then, and gradients would vanish."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _of_int8(module: nn.Module) -> LibraryWeight:
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


def _is_torchao(weight) -> bool:
    return type(weight).__module__.startswith("torchao.")
