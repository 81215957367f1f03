"""What a call of a DoRA layer takes, gives, and keeps for its backward."""

from typing import NamedTuple

import torch

from .base_weights import Weight
from .output import OutputUse
from .types import NormScale, Rounding


class Call(NamedTuple):
    """The constants of one call: what `dispatch` chose and the caller asked for."""

    space: str
    impl: str
    scaling: float
    rounding: Rounding
    dropout: str | None  # the mode, where dropout is active
    trains: bool
    output_use: OutputUse | None = None
    merge_aware: bool = False


class Inputs(NamedTuple):
    """The tensors of one call, its tokens flattened."""

    x: torch.Tensor  # [M, K]
    x_dropped: torch.Tensor | None  # [M, K], where dropout is active
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    bias: torch.Tensor | None
    weight: Weight
    given: NormScale | None  # n and g, where they are known


class Gradients(NamedTuple):
    """One entry for each differentiable input: its gradient, the dtype that is asked for, or whether one is."""

    x: torch.Tensor | torch.dtype | bool | None
    x_dropped: torch.Tensor | torch.dtype | bool | None
    lora_A: torch.Tensor | torch.dtype | bool | None
    lora_B: torch.Tensor | torch.dtype | bool | None
    magnitude: torch.Tensor | torch.dtype | bool | None
    bias: torch.Tensor | torch.dtype | bool | None


NO_GRADIENTS = Gradients(*(False,) * 6)


class Saved(NamedTuple):
    """What the backward reads.

    dm comes from `base_out` or from `output`: at most one tensor of the output's size is kept. Where neither is left,
    as the model wrote over `output`, the backward computes one of `lora_x` again.
    """

    lora_x: torch.Tensor | None  # [M, K], what A multiplied
    h: torch.Tensor | None  # [M, R]
    base_out: torch.Tensor | None  # [M, N] z, plus `base_bias` where there is one
    output: torch.Tensor | None  # [M, N] y without its bias
    base_bias: torch.Tensor | None  # [N]
    lora_A: torch.Tensor  # in token space in x's dtype
    lora_B: torch.Tensor
    weight_norm: torch.Tensor
    mag_norm_scale: torch.Tensor
    weight: Weight
    merged: torch.Tensor | None = None  # [N, K] W', inside a checkpointed region, or kept by `accumulating`
    A_cast: torch.Tensor | None = None  # in weight space A in x's dtype, where the backward's merge wrote it beside

    @property
    def product(self) -> torch.Tensor | None:
        """What dm is read from."""
        return self.output if self.base_out is None else self.base_out

    @property
    def norm_scale(self) -> NormScale:
        return NormScale(self.weight_norm, self.mag_norm_scale)

    def for_backward(self, needs: Gradients) -> "Saved":
        """Without what no gradient needs."""
        return self._replace(
            lora_x=self.lora_x if needs.lora_A or (needs.magnitude and self.product is None) else None,
            h=self.h if needs.lora_B or needs.magnitude else None,
            base_out=self.base_out if needs.magnitude else None,
            output=self.output if needs.magnitude else None,
            base_bias=self.base_bias if needs.magnitude else None,
        )
