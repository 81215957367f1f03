"""bitsandbytes' 4-bit weights: NF4, which the operations decode themselves, and FP4, which the library dequantises."""

from typing import NamedTuple

import torch
from torch import nn

from .library import LibraryWeight
from .parts import packed


@packed
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
    def straddles(self) -> bool:
        """Whether a block, or even a byte, holds elements of two output features."""
        return self.shape[1] % self.blocksize > 0

    @property
    def note(self) -> str:
        return "NF4 is decoded in the same pass" + (", rounded first as PEFT does" if self.parity else "")

    def element_size(self) -> float:
        """Bytes of one element, its share of the statistics left out."""
        return 0.5

    def rounding(self, mode: str) -> str:
        """To nearest, unless `parity` rounds what is decoded. Decoded values have no zero bits behind the 16-bit
        mantissa that a small update could fall into: rounding to nearest is unbiased over them already, and a fresh
        adapter stays an exact no-op."""
        return mode if self.parity else "nearest"


def recognises(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__name__ == "Params4bit" or _state_of(module) is not None


def read(module: nn.Module, nf4_parity: bool) -> Nf4Weight | LibraryWeight:
    return of_params4bit(module.weight, _state_of(module), nf4_parity=nf4_parity)


def _state_of(module: nn.Module):
    # The layer keeps it too: pickling, for one, makes a plain parameter of the weight.
    return getattr(getattr(module, "weight", None), "quant_state", None) or getattr(module, "quant_state", None)


def of_params4bit(weight: nn.Parameter, state, *, nf4_parity: bool = False) -> Nf4Weight | LibraryWeight:
    """The weight of a `Params4bit` and its `quant_state`.

    Raises:
        ValueError: it was not quantised yet, its scales are on another device, or it was repacked for a CPU.
    """
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
