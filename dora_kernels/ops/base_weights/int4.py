"""4-bit integers with a scale, and often a zero, for each group of input features."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .parts import check_parts, packed

INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)


class Int4Layout(NamedTuple):
    """How codes, scales and zeros lie in memory. A word of 32 bits holds eight codes, the first in the lowest bits."""

    rows_are_outputs: bool  # codes, scales and zeros begin with N, else with K or its groups
    words_along_outputs: bool = False  # a word of codes holds eight output features, else eight input features
    interleaved: bool = False  # a word holds its elements in the order `INTERLEAVED`


@packed
class Int4Weight(NamedTuple):
    """W = (code − zero) · scale, rounded to the scales' dtype; without zeros, zero = 8.

    Shapes are those of `layout.rows_are_outputs`; else they are transposed. Zeros are packed along N in each layout.
    """

    codes: torch.Tensor  # int32 [N, ⌈K / 8⌉], or [⌈N / 8⌉, K] with `layout.words_along_outputs`
    scales: torch.Tensor  # [N, K / group]
    zeros: torch.Tensor | None  # int32 [⌈N / 8⌉, K / group]
    groups: torch.Tensor | None  # int32 [K], each input feature's group; None where groups lie side by side
    group: int  # input features that share a scale
    shape: torch.Size  # [N, K]
    layout: Int4Layout

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def note(self) -> str:
        return "int4 is decoded in the same pass"

    def element_size(self) -> float:
        """Bytes of one element, its share of scales and zeros left out."""
        return 0.5

    def rounding(self, mode: str) -> str:
        """As asked where scales have 16 bits: every value is then on their grid, into whose gaps small updates would
        fall. Else to nearest, which is unbiased over such values already and keeps a fresh adapter a no-op."""
        return mode if self.scales.element_size() == 2 else "nearest"


def checked(weight: Int4Weight, kind: str) -> Int4Weight:
    """The weight itself.

    Raises:
        ValueError: tensors of other shapes, dtypes or devices, or of which this process holds a part.
    """
    N, K = weight.shape
    G = K // weight.group if weight.group else 0
    words = (-(-N // 8), K) if weight.layout.words_along_outputs else (N, -(-K // 8))
    shapes = {"codes": words, "scales": (N, G), "zeros": (-(-N // 8), G), "groups": (K,)}
    if not weight.layout.rows_are_outputs:
        shapes = {name: shape[::-1] for name, shape in shapes.items()}
    check_parts(weight, shapes, kind)
    for name in shapes:
        if (tensor := getattr(weight, name)) is None:
            continue
        is_number = tensor.is_floating_point() and tensor.element_size() >= 2
        if not (is_number if name == "scales" else tensor.dtype == torch.int32):
            raise ValueError(f"the {name} of this {kind} weight are {tensor.dtype}, which is not known here")
    if K % weight.group:
        raise ValueError(f"this {kind} weight has {K} input features, which groups of {weight.group} do not divide")
    return weight


def packed_words(codes: torch.Tensor, dim: int, interleaved: bool) -> torch.Tensor:
    """Codes from 0 to 15, eight along `dim` in each word of 32 bits; those that a last word lacks are 0."""
    eights = F.pad(codes.movedim(dim, -1), (0, -codes.shape[dim] % 8)).unflatten(-1, (-1, 8)).int()
    if interleaved:
        eights = eights[..., torch.tensor(INTERLEAVED, device=codes.device)]
    # In 32 bits: they share no bit, and the highest is the sign.
    shifts = 4 * torch.arange(8, device=codes.device, dtype=torch.int32)
    return (eights << shifts).sum(-1, dtype=torch.int32).movedim(-1, dim)
