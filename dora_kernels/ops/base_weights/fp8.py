"""transformers' FP8 layers: e4m3 numbers with a scale for each block, or one for all."""

from typing import NamedTuple

import torch
from torch import nn

from .parts import packed


@packed
class Fp8Weight(NamedTuple):
    """FP8 as it lies in memory: w = code · scale[n // rows, k // columns] in fp32, with `block` = (rows, columns)."""

    codes: torch.Tensor  # float8 [N, K]
    scales: torch.Tensor  # fp32 or powers of two in 8 bits [⌈N / rows⌉, ⌈K / columns⌉]
    block: tuple[int, int]
    dtype: torch.dtype  # in which the layer computes

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def note(self) -> str:
        return "FP8 is decoded in the same pass; activations are not quantised, as the layer's own forward does"

    def element_size(self) -> float:
        """Bytes of one element, its share of the scales left out."""
        return 1.0

    def rounding(self, mode: str) -> str:
        """As asked where scales are powers of two: every value is then on a 16-bit grid, into whose gaps small updates
        would fall. Else to nearest, which is unbiased over such values already and keeps a fresh adapter a no-op."""
        return mode if self.scales.dtype == torch.float8_e8m0fnu else "nearest"


def recognises(module: nn.Module) -> bool:
    # By its own name: a subclass may compute something else.
    return type(module).__name__ == "FP8Linear" and getattr(module, "weight", None) is not None


def read(module: nn.Module, nf4_parity: bool) -> Fp8Weight:
    codes, scales = module.weight.detach(), getattr(module, "weight_scale_inv", None)
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"this FP8 weight was cast to {codes.dtype}, without its scales: load the model again")
    if scales is None:
        raise ValueError("this FP8 weight has no `weight_scale_inv` beside it")
    if scales.device != codes.device:
        raise ValueError(f"this FP8 weight is on {codes.device} and its scales on {scales.device}")
    block = tuple(codes.shape) if module.block_size is None else tuple(module.block_size)
    scales = scales.detach().reshape(1, 1) if module.block_size is None else scales.detach()
    expected = tuple(-(-size // part) for size, part in zip(codes.shape, block, strict=True))
    if tuple(scales.shape) != expected:
        raise ValueError(f"this FP8 weight has scales {list(scales.shape)}; blocks of {block} have {list(expected)}")
    dtype = module.bias.dtype if module.bias is not None else torch.bfloat16
    return Fp8Weight(codes, scales, block, dtype)
