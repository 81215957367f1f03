"""`DoraLinear`: a linear layer with a frozen base weight and a trained DoRA adapter."""

import math
from types import ModuleType

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import dispatch
from .freezable import Freezable
from .functional import dora_linear


class DoraLinear(Freezable):
    """y = g ⊙ (x Wᵀ + s x Aᵀ Bᵀ) + b with g = m / ‖W + s B A‖ per output feature.

    `weight` and `bias` are the base layer's own parameters (shared, frozen), under their own names, so that the base
    model's state-dict keys do not change. `lora_A` [R, K], `lora_B` [N, R] and `magnitude` [N] are trained.

    Args:
        weight: [out_features, in_features], or [in_features, out_features] with `fan_in_fan_out` (GPT-2's Conv1D).
        bias: [out_features] or None.
        r: rank, at least 1.
        lora_alpha: the scaling s is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
        lora_dropout, dropout_mode, space, impl, rounding, salt: see `dora_linear`.
        adapter_dtype: dtype of the trained parameters; fp32 by default, whatever the base has.

    Raises:
        ValueError: `r` < 1 or a weight that is not two-dimensional.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        fan_in_fan_out: bool = False,
        dropout_mode: str = "lora",
        space: str = "auto",
        impl: str = "auto",
        rounding: str = "dithered",
        salt: int = 0,
        adapter_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        if weight.ndim != 2:
            raise ValueError(f"weight must be [out_features, in_features], got shape {list(weight.shape)}")
        out_features, in_features = reversed(weight.shape) if fan_in_fan_out else weight.shape
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.lora_alpha, self.use_rslora, self.fan_in_fan_out = lora_alpha, use_rslora, fan_in_fan_out
        self.lora_dropout, self.dropout_mode = lora_dropout, dropout_mode
        self.space, self.impl, self.rounding, self.salt = space, impl, rounding, salt
        self.weight, self.bias = weight, bias
        for frozen in (weight, bias):
            if frozen is not None:
                frozen.requires_grad_(False)
        if adapter_dtype is None:
            adapter_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        options = {"device": weight.device, "dtype": adapter_dtype}
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, **options))
        self.magnitude = nn.Parameter(torch.empty(out_features, **options))
        self.reset_adapter()

    @property
    def scaling(self) -> float:
        """s: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def base_weight(self) -> torch.Tensor:
        """The frozen weight as [out_features, in_features], a view."""
        return self.weight.T if self.fan_in_fan_out else self.weight

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Draws A (PEFT's Kaiming uniform), zeroes B and sets m to ‖W‖, so that the layer equals its base layer."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_B.zero_()
        if not self.weight.is_meta:
            # The kernel that forward runs, in its summation order: g is exactly 1.
            self.magnitude.copy_(self.weight_norm()[0])

    def plan(self, tokens: int) -> dispatch.Plan:
        """What a call with `tokens` rows would run in the layer's present mode, and why."""
        return dispatch.choose(
            tokens=tokens,
            out_features=self.out_features,
            in_features=self.in_features,
            dtype=self.weight.dtype,
            device=self.weight.device,
            has_bias=self.bias is not None,
            dropout=self.dropout_mode if self.training and self.lora_dropout > 0 else None,
            trains=self.training and any(parameter.requires_grad for parameter in self.parameters()),
            trains_magnitude=self.training and self.magnitude.requires_grad,
            space=self.space,
            impl=self.impl,
        )

    @property
    def rank(self) -> int:
        """`r`, under the name that patched PEFT layers have too."""
        return self.r

    @torch.no_grad()
    def weight_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """n = ‖W + s B A‖ and g = m / n, both [out_features], fp32 (fp64 for an fp64 layer)."""
        with dispatch.on_device_of(self.weight):
            return self._operations().weight_norm(*self._factors(), self.scaling)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W' = g ⊙ (W + s B A) [out_features, in_features], in fp32, rounded once to `dtype`, or to the weight's."""
        rounded = {"dtype": dtype or self.weight.dtype, "rounding": self.rounding, "salt": self.salt}
        with dispatch.on_device_of(self.weight):
            return self._operations().merge(*self._factors(), self.scaling, **rounded)[0]

    def _factors(self) -> tuple[torch.Tensor, ...]:
        return self.base_weight, self.lora_A, self.lora_B, self.magnitude

    def _operations(self) -> ModuleType:
        return dispatch.implementation(dispatch.choose_impl(self.weight.device, self.impl)[0])

    @classmethod
    def from_linear(cls, linear: nn.Linear | Conv1D, *, r: int, lora_alpha: float, **options) -> "DoraLinear":
        """Wraps `linear` without copying: its weight and bias become this layer's, frozen.

        Raises:
            TypeError: `linear` is neither an `nn.Linear` nor a `transformers` `Conv1D`.
        """
        if not isinstance(linear, (nn.Linear, Conv1D)):
            raise TypeError(f"from_linear takes an nn.Linear or a transformers Conv1D, got {type(linear).__name__}")
        fan_in_fan_out = isinstance(linear, Conv1D)
        layer = cls(linear.weight, linear.bias, r=r, lora_alpha=lora_alpha, fan_in_fan_out=fan_in_fan_out, **options)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear | Conv1D:
        """A plain layer of the base layer's class with the merged weight and the base layer's bias."""
        weight = self.merged_weight()
        weight = nn.Parameter(weight.T.contiguous() if self.fan_in_fan_out else weight, requires_grad=False)
        with torch.device("meta"):
            if self.fan_in_fan_out:
                linear = Conv1D(self.out_features, self.in_features)
            else:
                linear = nn.Linear(self.in_features, self.out_features)
        # Conv1D always has a bias; nn.Linear takes None.
        linear.weight, linear.bias = weight, self.bias
        return linear.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dora_linear(
            x,
            self.base_weight,
            self.lora_A,
            self.lora_B,
            self.magnitude,
            scaling=self.scaling,
            bias=self.bias,
            space=self.space,
            impl=self.impl,
            rounding=self.rounding,
            lora_dropout=self.lora_dropout,
            dropout_mode=self.dropout_mode,
            training=self.training,
            salt=self.salt,
            frozen_scale=self.frozen_scale,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, scaling={self.scaling:g}, space={self.space}, impl={self.impl}, rounding={self.rounding}"
        )
