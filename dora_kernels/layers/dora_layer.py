"""`DoraLayer`: what all layers with a frozen weight and a trained DoRA adapter share."""

import math
import warnings
from typing import ClassVar

import torch
from torch import nn

from ..config import check_bools
from ..ops import dispatch
from ..ops.base_weights import Weight
from ..ops.output import OutputUse
from ..ops.served import served_norm
from ..ops.types import NormScale, Rounding
from .frozen import Freezable
from .support import REMEDY, is_offloaded


class DoraLayer(Freezable):
    """A layer whose weight is seen as a matrix W [N, K], and its adapter as A [R, K], B [N, R] and m [N].

    Its own shapes, of the weight and of the parameters `lora_A`, `lora_B` and `magnitude`, are those of the layer it
    stands for and those of PEFT's files.

    A subclass has `base_weight`, `factors` and `shapes_of`, makes its adapter with `add_adapter`, and says where the
    plain layer's weight is with `from_matrix`.
    """

    file_names: ClassVar[dict[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "magnitude": "lora_magnitude_vector",
    }
    """By parameter, its name in PEFT's files, below the layer's path."""

    zeroed = "lora_B"
    """The factor that starts as zeros; the other one is drawn."""

    merge_aware = False
    """Whether it multiplies with W' as it will be served: see `dora_linear`."""

    in_features: int
    out_features: int
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter

    def add_adapter(
        self,
        base: Weight,
        shapes: dict[str, tuple[int, ...]],
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        dropout_mode: str = "lora",
        space: str = "auto",
        impl: str = "auto",
        rounding: str = "dithered",
        salt: int = 0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """Freezes the layer's parameters and gives it new ones of these `shapes`, which start as a no-op."""
        check_bools(use_rslora=use_rslora)
        self.out_features, self.in_features = base.shape
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.lora_dropout, self.dropout_mode = lora_dropout, dropout_mode
        self.space, self.impl, self.rounding, self.salt = space, impl, rounding, salt
        self.output_use = OutputUse()
        self.requires_grad_(False)
        if adapter_dtype is None:
            adapter_dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, device=base.device, dtype=adapter_dtype)))
        self.reset_adapter()

    @property
    def scaling(self) -> float:
        """s: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def rank(self) -> int:
        """`r`, under the name that patched PEFT layers have too."""
        return self.r

    @property
    def base_weight(self) -> Weight:
        """The frozen weight as a matrix [N, K]: a view of the base layer's, or how its format is read."""
        raise NotImplementedError

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A [R, K], B [N, R] and m [N]: the parameters, or views of them."""
        return self.lora_A, self.lora_B, self.magnitude

    @property
    def base_device(self) -> torch.device:
        return self.base_weight.device

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Draws a factor as PEFT does, zeroes the other one and sets m to ‖W‖, so that the layer equals its base."""
        self.draw_factor()
        getattr(self, self.zeroed).zero_()
        if self.lora_A.device.type != "meta":
            # The kernel that forward runs, in its summation order: g is exactly 1.
            self.magnitude.copy_(self.weight_norm()[0].view_as(self.magnitude))

    def draw_factor(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def weight_norm(self) -> NormScale:
        """n = ‖W + s B A‖ and g = m / n, both [N], fp32 (fp64 for an fp64 layer)."""
        with dispatch.operations_for(self.base_weight, self.impl) as (ops, base):
            if self.merge_aware:
                return served_norm(ops, base, *self.factors, self.scaling)
            return ops.weight_norm(base, *self.factors, self.scaling)[0]

    def dense_base(self, dtype: torch.dtype) -> torch.Tensor:
        """W [N, K] as a matrix in `dtype`: a quantised weight decoded."""
        return dispatch.dense_weight(self.base_weight, dtype, self.impl)

    def merged_weight(self, dtype: torch.dtype | None = None, base: torch.Tensor | None = None) -> torch.Tensor:
        """W' = g ⊙ (W + s B A) [N, K], in fp32, rounded once to `dtype`, or to the weight's; `base` [N, K] takes the
        place of W. With `merge_aware` it is quantised as it will be served, and decoded, unless `base` is given.

        Raises:
            ValueError: there is none, see `why_not_merged`.
        """
        if reason := self.why_not_merged:
            raise ValueError(f"this {type(self).__name__} cannot be merged: it {reason}")
        weight = self.base_weight if base is None else base.to(self.lora_A.device)
        return dispatch.merged_weight(
            weight, *self.factors, self.scaling,
            dtype=dtype, rounding=Rounding(self.rounding, self.salt), impl=self.impl,
            merge_aware=self.merge_aware and base is None,
        )  # fmt: skip

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix [N, K] in the shape of the plain layer's weight."""
        return matrix

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The plain layer's weight as a matrix [N, K]."""
        return weight

    @property
    def why_not_merged(self) -> str | None:
        """Why no plain layer computes what this one does, or None."""
        return None

    def refuse_offloaded(self) -> None:
        """Raises ValueError where the adapter would not train, as its parameters are thrown away after forward."""
        if self.training and torch.is_grad_enabled() and is_offloaded(self):
            # Its parameters are copies that accelerate throws away after forward, and gradients with them.
            raise ValueError(f"this layer is offloaded by accelerate, so that its adapter would not train: {REMEDY}")

    def train(self, mode: bool = True) -> "DoraLayer":
        if mode:
            self._warn_of_16_bits()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "DoraLayer":
        super()._apply(*args, **kwargs)
        if self.training:
            self._warn_of_16_bits()
        return self

    def _warn_of_16_bits(self) -> None:
        if self.magnitude.requires_grad and self.magnitude.element_size() < 4:
            warnings.warn(
                "trained magnitudes are stored in 16 bits: their small updates round to none, and they stay where they "
                "are; keep the adapter in fp32 by casting the base before apply_dora, not the model after it",
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, scaling={self.scaling:g}, space={self.space}, impl={self.impl}, rounding={self.rounding}"
            f"{', merge_aware=True' if self.merge_aware else ''}"
        )
