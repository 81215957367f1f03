"""PEFT's LoRA layers on convolutions with a fused forward."""

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d

from ..layers.conv import geometry_of
from ..ops import dispatch
from ..ops.convolution import as_kernel, as_matrix, is_channels_last
from ..ops.dora_conv import choose, dora_conv, why_token_space
from .fused import FusedLayer, accepts_dtype


class FusedConv(FusedLayer):
    """The fused forward of PEFT's LoRA layers on convolutions."""

    @property
    def base_weight(self) -> torch.Tensor:
        """W [out_channels, K] of the base layer, in the order of memory."""
        return as_matrix(self.base_layer.weight, is_channels_last(self.base_layer.weight))

    def factors_of(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lora_A, lora_B, magnitude = self.parameters_of(adapter)
        matrix_A = as_matrix(lora_A, is_channels_last(self.base_layer.weight))
        return matrix_A, lora_B.flatten(1), magnitude.flatten()

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        weight = self.base_layer.weight
        return as_kernel(matrix, weight.shape, is_channels_last(weight))

    def accepts(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        dims = self.base_layer.weight.ndim
        if x.ndim != dims or x.shape[1] != self.in_features or x.device != weight.device:
            return False
        return accepts_dtype(x.dtype, weight)

    def fused_call(self, x: torch.Tensor, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        base, options = self.base_layer, self.dora_fusion.options
        return dora_conv(
            x,
            base.weight,
            *self.parameters_of(adapter),
            scaling=self.scaling[adapter],
            geometry=geometry_of(base),
            bias=base.bias,
            space=options["space"],
            impl=options["impl"],
            rounding=options["rounding"],
            training=self.training,
            salt=options["salt"],
            frozen_scale=self.frozen_scale_of(adapter),
            output_use=self.output_use,
        )

    def plan_of(self, adapter: str, tokens: int) -> dispatch.Plan:
        weight, options = self.base_layer.weight, self.dora_fusion.options
        trains = self.training and self.parameters_of(adapter)[2].requires_grad
        only_token = why_token_space(weight, geometry_of(self.base_layer), weight.dtype, None, trains)
        return choose(weight.device, options["space"], options["impl"], only_token)


class FusedConv1d(FusedConv, Conv1d):
    """PEFT's `lora.Conv1d`."""

    peft_class = Conv1d


class FusedConv2d(FusedConv, Conv2d):
    """PEFT's `lora.Conv2d`."""

    peft_class = Conv2d


class FusedConv3d(FusedConv, Conv3d):
    """PEFT's `lora.Conv3d`."""

    peft_class = Conv3d


FUSED_CONVOLUTIONS = {Conv1d: FusedConv1d, Conv2d: FusedConv2d, Conv3d: FusedConv3d}
"""The fused class of each of PEFT's."""
