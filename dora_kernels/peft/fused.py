"""What the fused forwards of PEFT's LoRA layers share."""

from dataclasses import dataclass, field
from operator import is_

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..layers.frozen import Freezable
from ..layers.support import check_weights_loaded
from ..ops import dispatch
from ..ops.base_weights import Weight
from ..ops.output import OutputUse
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


class FusedLayer(Freezable):
    """Mixed into a LoRA layer of PEFT's (`peft_class`), whose calls it fuses unless `why_left_to_peft` has a reason.

    An instance becomes one by assigning its `__class__`. Parameters, keys and isinstance stay as they are, and deepcopy
    and pickle keep it; a `forward` put on the instance would be lost by pickle. Whether a call is fused is decided at
    each call, as adapters may be added, chosen, disabled, merged and deleted in between.

    A subclass has `base_weight`, `accepts`, `fused_call` and `plan_of`.
    """

    peft_class: type[nn.Module]
    dora_fusion: Fusion
    # While the module around it runs: see `blocks.siblings`.
    shared_call = None
    shared_hooks: tuple[RemovableHandle, ...] = ()

    def __getstate__(self) -> dict:
        state = super().__getstate__()
        # Copied without the module around it, a layer has no hooks there: torch refuses to copy their handles again.
        if any(hook.hooks_dict_ref() is None for hook in self.shared_hooks):
            del state["shared_hooks"]
        return state

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        # A wrapper made while the layer was patched may call this after it was unpatched.
        if not isinstance(self, FusedLayer):
            return type(self).forward(self, x, *args, **kwargs)
        call = None if args or kwargs else self.shared_call
        if call is not None and (y := call.output(self, x)) is not None:
            return y
        # torch.jit.trace records PyTorch's own operations: those of PEFT's forward, which have the same meaning.
        adapter = None if args or kwargs or torch.jit.is_tracing() else fused_adapter(self)
        weight = None if adapter is None else self.readable_base()
        if weight is None or not self.accepts(x, weight):
            self._check_loaded(x)
            return self.peft_class.forward(self, x, *args, **kwargs)
        self.forget_peft_cache(adapter)
        return self.fused_call(x, adapter, weight)

    @property
    def base_weight(self) -> Weight:
        """W [N, K] of the base layer, as its format is read."""
        raise NotImplementedError

    def accepts(self, x: torch.Tensor, weight: Weight) -> bool:
        """Whether the engine has PEFT's meaning for this input; PEFT answers the rest, or raises its own error."""
        raise NotImplementedError

    def fused_call(self, x: torch.Tensor, adapter: str, weight: Weight) -> torch.Tensor:
        """The layer's output with this adapter over W [N, K]."""
        raise NotImplementedError

    def plan_of(self, adapter: str, tokens: int) -> dispatch.Plan:
        """What a fused call with `tokens` rows would run, and why."""
        raise NotImplementedError

    def parameters_of(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A, B and m of an adapter."""
        magnitude = self.lora_magnitude_vector[adapter].weight
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight, magnitude

    def factors_of(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same as A [R, K], B [N, R] and m [N]."""
        return self.parameters_of(adapter)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix [N, K] in the shape of the base layer's weight."""
        return matrix

    def zeroed_of(self, adapter: str) -> torch.Tensor:
        """The factor of an adapter that PEFT starts as zeros."""
        return self.parameters_of(adapter)[1]

    def readable_base(self) -> Weight | None:
        """`base_weight`, or None where a quantised weight cannot be read: its library changed it since the last
        call."""
        try:
            return self.base_weight
        except ValueError:
            return None

    def forget_peft_cache(self, adapter: str) -> None:
        """PEFT does so on each call outside its `DoraCaching`."""
        magnitude = self.lora_magnitude_vector[adapter]
        if magnitude._dora_cache:
            magnitude._cache_clear()

    def _check_loaded(self, x: torch.Tensor) -> None:
        """PEFT's DoRA would read weights that are not there, and say only that they are on the meta device."""
        variants = (self.lora_variant.get(adapter) for adapter in self.active_adapters)
        if x.is_meta or self.disable_adapters or self.merged or not any(variants):
            return
        check_weights_loaded(self, "run DoRA, PEFT's or fused")

    def weight_norm(self) -> NormScale:
        """n and g of the active adapter, as forward computes them."""
        (adapter,) = active_adapters(self)
        return self.norm_and_scale(adapter, self.dora_fusion.options["impl"])

    def norm_and_scale(self, adapter: str, impl: str) -> NormScale:
        """n and g [N] of W [N, K] and this adapter, as forward computes them."""
        with dispatch.operations_for(self.base_weight, impl) as (ops, base):
            return ops.weight_norm(base, *self.factors_of(adapter), self.scaling[adapter])[0]

    def merged_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W' [N, K] of the active adapter, in fp32, rounded once to `dtype`, or to the weight's.

        Raises:
            ValueError: the layer is left to PEFT in its present state.
        """
        if reason := why_left_to_peft(self):
            raise ValueError(f"it is left to PEFT: {reason}")
        (adapter,), options = active_adapters(self), self.dora_fusion.options
        rounding = Rounding(options["rounding"], options["salt"])
        factors = *self.factors_of(adapter), self.scaling[adapter]
        return dispatch.merged_weight(self.base_weight, *factors, dtype=dtype, rounding=rounding, impl=options["impl"])

    def freeze(self) -> None:
        """Keeps n and g of the active adapter; a layer that is left to PEFT stays as it is."""
        if why_left_to_peft(self) is None:
            super().freeze()
            (adapter,) = active_adapters(self)
            self.dora_fusion.frozen_factors = *self.parameters_of(adapter), self.scaling[adapter]

    def thaw(self) -> None:
        super().thaw()
        self.dora_fusion.frozen_factors = None

    def merge(self, *args, **kwargs) -> None:
        self.refuse_if_frozen("merge")
        # PEFT writes W here, and takes the update out again with a rounding.
        self.output_use.forget()
        super().merge(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT's `unload` puts in the layer's place. It knows no blocks: the hooks around this one end here."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for hook in self.shared_hooks:
            hook.remove()
        return self.get_base_layer()

    def frozen_scale_of(self, adapter: str) -> NormScale | None:
        """The kept n and g, where they are those of this adapter: another one may be active by now, or rescaled."""
        if self.frozen_scale is None:
            return None
        return self.frozen_scale if self._is_frozen_for(*self.parameters_of(adapter), self.scaling[adapter]) else None

    def _is_frozen_for(self, lora_A, lora_B, magnitude, scaling) -> bool:
        kept = self.dora_fusion.frozen_factors
        return kept is not None and kept[3] == scaling and all(map(is_, kept, (lora_A, lora_B, magnitude)))

    def plan(self, tokens: int) -> dispatch.Plan:
        """What a call with `tokens` rows would run in the layer's present state, and why."""
        reason = why_left_to_peft(self)
        if reason is not None:
            return dispatch.Plan("token", "peft", f"left to PEFT: {reason}")
        (adapter,) = active_adapters(self)
        return dispatch.explained(self.plan_of(adapter, tokens), self.base_weight)

    @property
    def output_use(self) -> OutputUse:
        return self.dora_fusion.output_use

    @property
    def rank(self) -> int:
        """Of the active adapters together."""
        return sum(self.r[adapter] for adapter in active_adapters(self))


def accepts_dtype(dtype: torch.dtype, weight: Weight) -> bool:
    """Whether the engine computes with a floating-point input of this dtype as PEFT does."""
    if dtype == weight.dtype or not isinstance(weight, torch.Tensor):
        return dtype.is_floating_point
    return torch.is_autocast_enabled(weight.device.type) and torch.float64 not in (dtype, weight.dtype)


def dropout_rate(dropout: nn.Module) -> float:
    """The probability of PEFT's dropout in its present mode."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
