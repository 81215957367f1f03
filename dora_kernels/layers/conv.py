"""`DoraConv`: a convolution with a frozen base weight and a trained DoRA adapter."""

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..config import check_rank
from ..ops import dispatch
from ..ops.convolution import Geometry, as_kernel, as_matrix, is_channels_last
from ..ops.dora_conv import choose, dora_conv, norm_and_scale, why_no_weight, why_token_space
from ..ops.types import NormScale
from .dora_layer import DoraLayer
from .support import why_not_format, why_not_weight, why_wrapped

CONVOLUTIONS: dict[int, type[_ConvNd]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""The layers that can be adapted, by the dimensions of their weight."""

SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class DoraConv(DoraLayer):
    """y = g ⊙ (conv(x, W) + s conv₁(conv(x, A), B)) + b with g = m / ‖W + s B A‖ per output channel, as PEFT has it.

    `weight` and `bias` are the base layer's own parameters (shared, frozen). `lora_A` [R, in_channels, *kernel_size],
    `lora_B` [out_channels, R / groups, 1, …] and `magnitude` [1, out_channels, 1, …] are trained. As a matrix W is
    [out_channels, in_channels / groups · Πkernel_size].

    Args:
        conv: an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.
        r: rank, a multiple of `conv.groups`.
        adapter: `lora_alpha`, `lora_dropout`, `use_rslora`, `dropout_mode`, `space`, `impl`, `rounding`, `salt` and
            `adapter_dtype`, as for `DoraLinear`.

    Raises:
        TypeError: another class. ValueError: an `r` that does not fit, or a layer that `why_not_conv` has a reason for.
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, *, r: int, **adapter):
        super().__init__()
        check_rank("`r`", r)
        if not isinstance(conv, tuple(CONVOLUTIONS.values())):
            raise TypeError(f"DoraConv takes an nn.Conv1d, nn.Conv2d or nn.Conv3d, got {type(conv).__name__}")
        if reason := why_not_conv_class(conv) or why_not_format(conv) or why_not_rank(conv, r):
            raise ValueError(f"DoraConv cannot adapt a layer that {reason}")
        self.weight, self.bias = conv.weight, conv.bias
        # Models read them off their layers.
        for name in SETTINGS:
            setattr(self, name, getattr(conv, name))
        self.add_adapter(self.base_weight, self.shapes_of(conv, r), r=r, **adapter)
        self.train(conv.training)

    @staticmethod
    def shapes_of(conv: _ConvNd, r: int) -> dict[str, tuple[int, ...]]:
        """Of the trained parameters."""
        ones = (1,) * len(conv.kernel_size)
        return {
            "lora_A": (r, conv.in_channels, *conv.kernel_size),
            "lora_B": (conv.out_channels, r // conv.groups, *ones),
            "magnitude": (1, conv.out_channels, *ones),
        }

    @property
    def geometry(self) -> Geometry:
        return geometry_of(self)

    @property
    def base_weight(self) -> torch.Tensor:
        """W [N, K], in the order of memory."""
        return as_matrix(self.weight, is_channels_last(self.weight))

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A [R, K], B [N, R] and m [N]. Of several groups there are none: see `why_not_merged`."""
        lora_A = as_matrix(self.lora_A, is_channels_last(self.weight))
        return lora_A, self.lora_B.flatten(1), self.magnitude.flatten()

    @property
    def base_dtype(self) -> torch.dtype:
        """Of what the layer computes outside autocast."""
        return self.weight.dtype

    @property
    def why_not_merged(self) -> str | None:
        return why_no_weight(self.geometry, self.kernel_size)

    def weight_norm(self) -> NormScale:
        """n = ‖W + s B A‖ and g = m / n, both [out_channels]; with several groups of PEFT's sum of W and B A."""
        factors = self.lora_A, self.lora_B, self.magnitude
        return norm_and_scale(self.weight, *factors, self.scaling, self.groups, self.impl)

    def plan(self, tokens: int) -> dispatch.Plan:
        """What a call in the layer's present mode would run, and why."""
        trains = self.training and self.magnitude.requires_grad
        dropout = self.dropout_mode if self.training and self.lora_dropout > 0 else None
        only_token = why_token_space(self.weight, self.geometry, self.base_dtype, dropout, trains)
        return choose(self.weight.device, self.space, self.impl, only_token)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        return as_kernel(matrix, self.weight.shape, is_channels_last(self.weight))

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return as_matrix(weight, is_channels_last(self.weight))

    def to_plain(self, base: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> _ConvNd:
        """The plain convolution with the merged weight and the base layer's bias; `base` and `dtype` as in
        `merged_weight`.

        Raises:
            ValueError: there is none, see `why_not_merged`.
        """
        weight = self.from_matrix(self.merged_weight(dtype or self.weight.dtype, base))
        conv = plain_conv(self, device="meta")
        conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return conv.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.refuse_offloaded()
        return dora_conv(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.magnitude,
            scaling=self.scaling,
            geometry=self.geometry,
            bias=self.bias,
            space=self.space,
            impl=self.impl,
            rounding=self.rounding,
            lora_dropout=self.lora_dropout,
            dropout_mode=self.dropout_mode,
            training=self.training,
            salt=self.salt,
            frozen_scale=self.frozen_scale,
            output_use=self.output_use,
        )

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in SETTINGS[2:])
        return f"{self.in_channels}, {self.out_channels}, {settings}, {super().extra_repr()}"


def geometry_of(conv: nn.Module) -> Geometry:
    """The settings of a convolution, adapted or not."""
    return Geometry(conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)


def plain_conv(conv: nn.Module, **factory) -> _ConvNd:
    """A new convolution of the same settings, adapted or not."""
    settings = {name: getattr(conv, name) for name in SETTINGS}
    return CONVOLUTIONS[conv.weight.ndim](**settings, bias=conv.bias is not None, **factory)


def why_not_conv(conv: nn.Module, kept: bool = False) -> str | None:
    """Why the engine cannot compute in the convolution's place, as what follows "the layer …"; None if it can.

    `kept` as in `support.why_not`.
    """
    if reason := why_not_conv_class(conv):
        return reason
    return why_not_weight(conv, kept, ndim=len(conv.kernel_size) + 2) or why_wrapped(conv, kept)


def why_not_conv_class(conv: nn.Module) -> str | None:
    """Why a layer of this class and these settings computes something else than PEFT adapts, or None."""
    if not any(
        isinstance(conv, cls) and type(conv).forward is cls.forward and type(conv)._conv_forward is cls._conv_forward
        for cls in CONVOLUTIONS.values()
    ):
        return "has a forward of its own"
    if conv.padding == "same" and max(conv.dilation) > 1:
        return 'is dilated with padding="same": PEFT\'s adapter is not dilated there, and another one once it is merged'
    return None


def why_not_rank(conv: nn.Module, r: int) -> str | None:
    """Why PEFT has no adapter of this rank, or None."""
    if r % conv.groups:
        return f"has {conv.groups} groups, of which the rank must be a multiple; r is {r}"
    return None
