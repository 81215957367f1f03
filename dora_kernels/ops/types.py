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
