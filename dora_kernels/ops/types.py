"""Small tuples that the operations take and return."""

from typing import NamedTuple

import torch


class Rounding(NamedTuple):
    """How fp32 values are rounded to bf16 or fp16."""

    mode: str  # "dithered" or "nearest"
    salt: int = 0  # any 32-bit number; different salts dither differently


NEAREST = Rounding("nearest")


class NormScale(NamedTuple):
    """n and g of a layer, each [N] in fp32, or in fp64 where an input is fp64."""

    norm: torch.Tensor
    scale: torch.Tensor


class KeptNorm(NamedTuple):
    """n and g of a layer, and the content of the factors that they are of, in memory of their own."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    norm_scale: NormScale

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.lora_A, self.lora_B, self.magnitude


class Adapted(NamedTuple):
    """A layer's weight and adapter, as one of several that are computed in one launch."""

    weight: torch.Tensor  # [N, K], contiguous
    lora_A: torch.Tensor  # [R, K]
    lora_B: torch.Tensor  # [N, R]
    magnitude: torch.Tensor  # [N]
    scaling: float
    rounding: Rounding


class GluFactors(NamedTuple):
    """The adapters of a gated MLP's gate and up, of one rank and one scaling."""

    h: torch.Tensor  # [M, 2 R], x Aᵀ of gate beside that of up, or [M, R] where both have one A
    lora_B: tuple[torch.Tensor, torch.Tensor]  # [I, R] each
    scale: torch.Tensor  # [2 I] g
    scaling: float

    @property
    def rank(self) -> int:
        return self.lora_B[0].shape[1]

    def of(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """h [M, R] and B [I, R] of gate (0) or up (1)."""
        start = index * self.rank if self.h.shape[1] > self.rank else 0
        return self.h[:, start : start + self.rank], self.lora_B[index]


class GluGradients(NamedTuple):
    """What the pass over a gated MLP's gradient returns, gate's beside up's."""

    products: torch.Tensor  # [M, 2 I], of x Wᵀ in token space, of x W'ᵀ in weight space
    magnitude: torch.Tensor  # [2 I]
    lora_B: torch.Tensor  # [2 I, R]
    scaled_B: torch.Tensor  # [2 I, R] in the products' dtype, s B in token space, s g ⊙ B in weight space
