"""PEFT's LoRA layer with a fused forward.

Imports PEFT, which is optional: imported only once a PEFT model is at hand.
"""

from dataclasses import dataclass, field
from operator import is_

import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from ..layers.frozen import Freezable
from ..layers.support import check_weights_loaded, why_wrapped
from ..ops import dispatch
from ..ops.base_weights import Weight, weight_of
from ..ops.dora_linear import dora_linear
from ..ops.members import BlockOptions, Member
from ..ops.output import OutputUse
from ..ops.problem import problem_of
from ..ops.types import NormScale, Rounding
from .eligibility import active_adapters, fused_adapter, why_left_to_peft


@dataclass
class Fusion:
    """What a patched layer carries: `dora_linear`'s options, and the fresh magnitudes that patching made exact."""

    options: dict
    # By adapter: the bits that PEFT had, and those put in their place.
    exact_magnitudes: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    # Inside `frozen_adapters`: A, B, m and s, of which the layer keeps the norm.
    frozen_factors: tuple | None = None
    output_use: OutputUse = field(default_factory=OutputUse)
    # The state in which the layer was last found to be fused, and its adapter: see `fused_adapter`.
    remembered: tuple[list, str] | None = None

    def __getstate__(self) -> dict:
        return vars(self) | {"remembered": None}


class FusedForward(Freezable):
    """Mixed into a LoRA layer of PEFT's (`peft_class`), whose calls it fuses unless `why_left_to_peft` has a reason.

    An instance becomes one by assigning its `__class__`. Parameters, keys and isinstance stay as they are, and deepcopy
    and pickle keep it; a `forward` put on the instance would be lost by pickle. Whether a call is fused is decided at
    each call, as adapters may be added, chosen, disabled, merged and deleted in between.
    """

    peft_class: type[nn.Module]
    dora_fusion: Fusion
    # While the module around it runs: see `blocks.siblings`.
    shared_call = None

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        # A wrapper made while the layer was patched may call this after it was unpatched.
        if not isinstance(self, FusedForward):
            return type(self).forward(self, x, *args, **kwargs)
        call = None if args or kwargs else self.shared_call
        if call is not None and (y := call.output(self, x)) is not None:
            return y
        # torch.jit.trace records PyTorch's own operations: those of PEFT's forward, which have the same meaning.
        adapter = None if args or kwargs or torch.jit.is_tracing() else fused_adapter(self)
        weight = None if adapter is None else _readable_base(self)
        if weight is None or not _accepts(self, x, weight):
            self._check_loaded(x)
            return self.peft_class.forward(self, x, *args, **kwargs)
        magnitude, scaling = self.lora_magnitude_vector[adapter], self.scaling[adapter]
        if magnitude._dora_cache:
            # PEFT clears it on each call outside `DoraCaching`.
            magnitude._cache_clear()
        factors = self.lora_A[adapter].weight, self.lora_B[adapter].weight, magnitude.weight
        dense = isinstance(weight, torch.Tensor)
        # bitsandbytes' 4-bit layers compute in a dtype of their own where the user set one, and answer in x's.
        compute_dtype = None if dense else getattr(self.base_layer, "compute_dtype", None)
        y = dora_linear(
            x if compute_dtype is None else x.to(compute_dtype),
            weight,
            *factors,
            scaling=scaling,
            bias=self.base_layer.bias,
            lora_dropout=_dropout_rate(self.lora_dropout[adapter]),
            dropout_mode="peft",
            training=self.training,
            frozen_scale=self.frozen_scale if self._is_frozen_for(*factors, scaling) else None,
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
        weight = _readable_base(self)
        if weight is None or not _accepts_dtype(dtype, weight):
            return f"is left to PEFT for {dtype}"
        if _dropout_rate(self.lora_dropout[adapter]) > 0:
            return "has dropout"
        if self.frozen_scale is not None:
            return "keeps its norm inside frozen_adapters"
        compute_dtype = getattr(self.base_layer, "compute_dtype", None)
        if not isinstance(weight, torch.Tensor) and compute_dtype not in (None, dtype):
            return f"computes in {compute_dtype}"
        magnitude = self.lora_magnitude_vector[adapter]
        if magnitude._dora_cache:
            # PEFT clears it on each call outside `DoraCaching`.
            magnitude._cache_clear()
        factors = self.lora_A[adapter].weight, self.lora_B[adapter].weight, magnitude.weight
        options = self.dora_fusion.options
        rounding = Rounding(options["rounding"], options["salt"])
        return Member(weight, *factors, self.base_layer.bias, self.scaling[adapter], rounding, self.output_use)

    @property
    def base_dtype(self) -> torch.dtype:
        """Of what the layer computes outside autocast."""
        return base_weight(self).dtype

    @property
    def base_device(self) -> torch.device:
        return base_weight(self).device

    @property
    def keeps_dtype(self) -> bool:
        """Whether it answers in the dtype of its input, under autocast too."""
        return not isinstance(base_weight(self), torch.Tensor)

    @property
    def block_options(self) -> BlockOptions:
        """What a block of this layer runs with."""
        return BlockOptions(self.dora_fusion.options["space"], self.dora_fusion.options["impl"])

    def _check_loaded(self, x: torch.Tensor) -> None:
        """PEFT's DoRA would read weights that are not there, and say only that they are on the meta device."""
        variants = (self.lora_variant.get(adapter) for adapter in self.active_adapters)
        if x.is_meta or self.disable_adapters or self.merged or not any(variants):
            return
        check_weights_loaded(self, "run DoRA, PEFT's or fused")

    def weight_norm(self) -> NormScale:
        """n and g of the active adapter, as forward computes them."""
        return norm_and_scale(*self._factors(), self.dora_fusion.options["impl"])

    def merged_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W' [out_features, in_features] of the active adapter, in fp32, rounded once to `dtype`, or to the weight's.

        Raises:
            ValueError: the layer is left to PEFT in its present state.
        """
        if reason := why_left_to_peft(self):
            raise ValueError(f"it is left to PEFT: {reason}")
        options = self.dora_fusion.options
        rounding = Rounding(options["rounding"], options["salt"])
        return dispatch.merged_weight(*self._factors(), dtype=dtype, rounding=rounding, impl=options["impl"])

    def freeze(self) -> None:
        """Keeps n and g of the active adapter; a layer that is left to PEFT stays as it is."""
        if why_left_to_peft(self) is None:
            super().freeze()
            self.dora_fusion.frozen_factors = self._factors()[1:]

    def thaw(self) -> None:
        super().thaw()
        self.dora_fusion.frozen_factors = None

    def merge(self, *args, **kwargs) -> None:
        self.refuse_if_frozen("merge")
        super().merge(*args, **kwargs)

    def _factors(self) -> tuple:
        """W [out_features, in_features], and A, B, m and s of the active adapter."""
        (adapter,) = active_adapters(self)
        magnitude = self.lora_magnitude_vector[adapter].weight
        factors = self.lora_A[adapter].weight, self.lora_B[adapter].weight, magnitude, self.scaling[adapter]
        return base_weight(self), *factors

    def _is_frozen_for(self, lora_A, lora_B, magnitude, scaling) -> bool:
        """Whether the kept norm is that of these factors: another adapter may be active by now, or rescaled."""
        kept = self.dora_fusion.frozen_factors
        return kept is not None and kept[3] == scaling and all(map(is_, kept, (lora_A, lora_B, magnitude)))

    def plan(self, tokens: int) -> dispatch.Plan:
        """What a call with `tokens` rows would run in the layer's present state, and why."""
        reason = why_left_to_peft(self)
        if reason is not None:
            return dispatch.Plan("token", "peft", f"left to PEFT: {reason}")
        (adapter,) = active_adapters(self)
        weight = base_weight(self)
        problem = problem_of(
            weight,
            self.lora_A[adapter].weight,
            self.lora_magnitude_vector[adapter].weight,
            self.base_layer.bias,
            tokens=tokens,
            dtype=weight.dtype,
            dropout="peft" if self.training and _dropout_rate(self.lora_dropout[adapter]) > 0 else None,
            trains=self.training and any(parameter.requires_grad for parameter in self.parameters()),
        )
        options = self.dora_fusion.options
        return dispatch.explained(dispatch.choose(problem, options["space"], options["impl"]), weight)

    @property
    def output_use(self) -> OutputUse:
        return self.dora_fusion.output_use

    @property
    def rank(self) -> int:
        """Of the active adapters together."""
        return sum(self.r[adapter] for adapter in active_adapters(self))


class FusedLinear(FusedForward, Linear):
    """PEFT's `lora.Linear`, on a dense base layer."""

    peft_class = Linear


def _readable_base(layer: nn.Module) -> Weight | None:
    """`base_weight`, or None where a quantised weight cannot be read: its library changed it since the last call."""
    try:
        return base_weight(layer)
    except ValueError:
        return None


def base_weight(layer: nn.Module) -> Weight:
    """W [out_features, in_features] of the base layer, as its format is read."""
    weight = weight_of(layer.base_layer, nf4_parity=layer.dora_fusion.options["nf4_parity"])
    return weight.T if layer.fan_in_fan_out else weight


def norm_and_scale(weight, lora_A, lora_B, magnitude, scaling, impl) -> NormScale:
    """n and g [out_features] of W [out_features, in_features], as forward computes them."""
    with dispatch.operations_for(weight, impl) as (ops, base):
        return ops.weight_norm(base, lora_A, lora_B, magnitude, scaling)[0]


def _accepts(layer: nn.Module, x: torch.Tensor, weight: Weight) -> bool:
    """Whether the engine has PEFT's meaning for this input; PEFT answers the rest, or raises its own error."""
    if x.ndim < 2 or x.shape[-1] != layer.in_features or x.device != weight.device:
        return False
    return _accepts_dtype(x.dtype, weight)


def _accepts_dtype(dtype: torch.dtype, weight: Weight) -> bool:
    if dtype == weight.dtype or not isinstance(weight, torch.Tensor):
        return dtype.is_floating_point
    return torch.is_autocast_enabled(weight.device.type) and torch.float64 not in (dtype, weight.dtype)


def _dropout_rate(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs `kind.forward` and nothing else, so that its work may be done in its place."""
    return (
        type(module).forward is kind.forward
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )
