"""PEFT's LoRA layer on a linear layer with a fused forward.

Imports PEFT, which is optional: imported only once a PEFT model is at hand.
"""

import torch
from peft.tuners.lora.layer import Linear

from ..layers.support import why_wrapped
from ..ops import dispatch
from ..ops.base_weights import Weight, weight_of
from ..ops.dora_linear import dora_linear
from ..ops.members import BlockOptions, Member
from ..ops.problem import problem_of
from ..ops.types import Rounding
from .eligibility import fused_adapter, why_left_to_peft
from .fused import FusedLayer, accepts_dtype, dropout_rate


class FusedForward(FusedLayer):
    """The fused forward of PEFT's LoRA layers on linear layers, dense and quantised."""

    @property
    def base_weight(self) -> Weight:
        """W [out_features, in_features] of the base layer, as its format is read."""
        weight = weight_of(self.base_layer, nf4_parity=self.dora_fusion.options["nf4_parity"])
        return weight.T if self.fan_in_fan_out else weight

    def accepts(self, x: torch.Tensor, weight: Weight) -> bool:
        if x.ndim < 2 or x.shape[-1] != self.in_features or x.device != weight.device:
            return False
        return accepts_dtype(x.dtype, weight)

    def fused_call(self, x: torch.Tensor, adapter: str, weight: Weight) -> torch.Tensor:
        dense = isinstance(weight, torch.Tensor)
        # bitsandbytes' 4-bit layers compute in a dtype of their own where the user set one, and answer in x's.
        compute_dtype = None if dense else getattr(self.base_layer, "compute_dtype", None)
        y = dora_linear(
            x if compute_dtype is None else x.to(compute_dtype),
            weight,
            *self.factors_of(adapter),
            scaling=self.scaling[adapter],
            bias=self.base_layer.bias,
            lora_dropout=dropout_rate(self.lora_dropout[adapter]),
            dropout_mode="peft",
            training=self.training,
            frozen_scale=self.frozen_scale_of(adapter),
            output_use=self.output_use,
            **self.dora_fusion.options,
        )
        return y if dense else y.to(x.dtype)

    def as_member(self, dtype: torch.dtype) -> Member | str:
        """The layer as a block of layers computes it for an input in `dtype`, or why it runs alone at this call."""
        if reason := why_wrapped(self, kept=True):
            return reason
        adapter = fused_adapter(self)
        if adapter is None:
            return f"is left to PEFT: {why_left_to_peft(self)}"
        weight = self.readable_base()
        if weight is None or not accepts_dtype(dtype, weight):
            return f"is left to PEFT for {dtype}"
        if dropout_rate(self.lora_dropout[adapter]) > 0:
            return "has dropout"
        if self.frozen_scale is not None:
            return "keeps its norm inside frozen_adapters"
        compute_dtype = getattr(self.base_layer, "compute_dtype", None)
        if not isinstance(weight, torch.Tensor) and compute_dtype not in (None, dtype):
            return f"computes in {compute_dtype}"
        self.forget_peft_cache(adapter)
        factors, options = self.factors_of(adapter), self.dora_fusion.options
        rounding = Rounding(options["rounding"], options["salt"])
        return Member(weight, *factors, self.base_layer.bias, self.scaling[adapter], rounding, self.output_use)

    @property
    def base_dtype(self) -> torch.dtype:
        """Of what the layer computes outside autocast."""
        return self.base_weight.dtype

    @property
    def base_device(self) -> torch.device:
        return self.base_weight.device

    @property
    def keeps_dtype(self) -> bool:
        """Whether it answers in the dtype of its input, under autocast too."""
        return not isinstance(self.base_weight, torch.Tensor)

    @property
    def block_options(self) -> BlockOptions:
        """What a block of this layer runs with."""
        return BlockOptions(self.dora_fusion.options["space"], self.dora_fusion.options["impl"])

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T.contiguous() if self.fan_in_fan_out else matrix

    def plan_of(self, adapter: str, tokens: int) -> dispatch.Plan:
        weight, (lora_A, _, magnitude) = self.base_weight, self.factors_of(adapter)
        problem = problem_of(
            weight,
            lora_A,
            magnitude,
            self.base_layer.bias,
            tokens=tokens,
            dtype=weight.dtype,
            dropout="peft" if self.training and dropout_rate(self.lora_dropout[adapter]) > 0 else None,
            trains=self.training and any(parameter.requires_grad for parameter in self.parameters()),
        )
        options = self.dora_fusion.options
        return dispatch.choose(problem, options["space"], options["impl"])


class FusedLinear(FusedForward, Linear):
    """PEFT's `lora.Linear`, on a dense base layer."""

    peft_class = Linear
