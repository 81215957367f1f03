"""4-bit floats (e2m1) with a scale for each group of input features: MXFP4 and NVFP4."""

from typing import NamedTuple

import torch

from .parts import check_parts, packed

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 to 7; those of 8 to 15 are their negatives, −0 among them."""


@packed
class Fp4Weight(NamedTuple):
    """W = value(code) · scale, in fp32, rounded to `dtype`. A byte holds two codes, the first in the low bits.

    NVFP4: scales are e4m3, divided by a global one, or multiplied by it where `is_factor`. MXFP4: scale =
    2^(byte − 127), and that of 255 is infinite.
    """

    codes: torch.Tensor  # uint8 [N, K / 2]
    scales: torch.Tensor  # float8_e4m3fn, or uint8 of MXFP4 [N, K / group]
    global_scale: torch.Tensor | None  # fp32 [1]
    group: int  # input features that share a scale
    shape: torch.Size  # [N, K]
    dtype: torch.dtype
    is_factor: bool = False

    @property
    def name(self) -> str:
        return "MXFP4" if self.scales.dtype == torch.uint8 else "NVFP4"

    @property
    def note(self) -> str:
        return f"{self.name} is decoded in the same pass"

    def element_size(self) -> float:
        """Bytes of one element, its share of the scales left out."""
        return 0.5

    def rounding(self, mode: str) -> str:
        """As asked where the weight has 16 bits: every value is then on their grid, into whose gaps small updates would
        fall. Else to nearest, which is unbiased over such values already and keeps a fresh adapter a no-op."""
        return mode if self.dtype.itemsize == 2 else "nearest"


GROUPS = {torch.float8_e4m3fn: 16, torch.uint8: 32}
"""By the scales' dtype: the input features of a group."""


def checked(weight: Fp4Weight, kind: str) -> Fp4Weight:
    """The weight itself.

    Raises:
        ValueError: scales in another dtype, tensors of other shapes or devices, or of which this process holds a part.
    """
    (N, K), group = weight.shape, GROUPS.get(weight.scales.dtype)
    if group is None:
        raise ValueError(
            f"this {kind} weight has scales in {weight.scales.dtype}: NVFP4's, e4m3, and MXFP4's, uint8, are known here"
        )
    if K % group or weight.group != group:
        raise ValueError(
            f"this {kind} weight has {K} input features in groups of {weight.group}; {weight.name} has {group}"
        )
    check_parts(weight, {"codes": (N, K // 2), "scales": (N, K // group), "global_scale": (1,)}, kind)
    return weight
