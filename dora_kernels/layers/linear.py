"""`DoraLinear`: a linear layer with a frozen base weight and a trained DoRA adapter."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import check_bools, check_rank
from ..ops import dispatch
from ..ops.base_weights import Weight, bias_of, is_quantized, keep_packed, needs_its_layer, weight_of
from ..ops.dora_linear import dora_linear
from ..ops.members import BlockOptions, Member
from ..ops.problem import problem_of
from ..ops.served import why_not_served
from ..ops.types import Rounding
from .dora_layer import DoraLayer
from .support import LINEAR_CLASSES, is_offloaded, why_not_format, why_wrapped


class DoraLinear(DoraLayer):
    """y = g ⊙ (x Wᵀ + s x Aᵀ Bᵀ) + b with g = m / ‖W + s B A‖ per output feature.

    `weight` and `bias` are the base layer's own parameters (shared, frozen), under their own names, so that the base
    model's state-dict keys do not change. `lora_A` [R, K], `lora_B` [N, R] and `magnitude` [N] are trained.

    Args:
        weight: [out_features, in_features], or [in_features, out_features] with `fan_in_fan_out` (GPT-2's Conv1D), or
            bitsandbytes' `Params4bit`.
        bias: [out_features] or None.
        r: rank, at least 1.
        lora_alpha: the scaling s is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
        lora_dropout, dropout_mode, space, impl, rounding, salt: see `dora_linear`.
        nf4_parity, merge_aware: see `dora_linear`.
        adapter_dtype: dtype of the trained parameters; fp32 by default, whatever the base has.
        compute_dtype: x is cast to it, and the output back (4-bit layers); None computes in x's dtype.
        base_layer: instead of `weight`, a layer without which its weight cannot be read (8 bits, FP8, FP4, int4, HQQ);
            its state-dict keys stay its own, below `base_layer`.

    Raises:
        ValueError: `r` < 1 or a weight that is not two-dimensional. TypeError: a flag that is no bool.
    """

    # While the module around it runs: see `blocks.siblings`.
    shared_call = None

    def __init__(
        self,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None = None,
        *,
        r: int,
        fan_in_fan_out: bool = False,
        nf4_parity: bool = False,
        merge_aware: bool = False,
        compute_dtype: torch.dtype | None = None,
        base_layer: nn.Module | None = None,
        **adapter,
    ):
        super().__init__()
        check_rank("`r`", r)
        check_bools(fan_in_fan_out=fan_in_fan_out, nf4_parity=nf4_parity, merge_aware=merge_aware)
        self.weight, self.bias, self.base_layer = weight, bias, base_layer
        # bitsandbytes' 4-bit layers keep it too: pickling, for one, makes a plain parameter of the weight.
        self.quant_state = getattr(weight, "quant_state", None)
        self.fan_in_fan_out, self.nf4_parity, self.compute_dtype = fan_in_fan_out, nf4_parity, compute_dtype
        base = self.base_weight
        if len(base.shape) != 2:
            raise ValueError(f"weight must be [out_features, in_features], got shape {list(base.shape)}")
        if merge_aware and (reason := why_not_served(base)):
            raise ValueError(f"merge_aware quantises the merged weight in its base's format, and this weight {reason}")
        self.merge_aware = merge_aware
        self.add_adapter(base, self.shapes(*base.shape, r), r=r, **adapter)

    @staticmethod
    def shapes(out_features: int, in_features: int, r: int) -> dict[str, tuple[int, ...]]:
        """Of the trained parameters."""
        return {"lora_A": (r, in_features), "lora_B": (out_features, r), "magnitude": (out_features,)}

    @classmethod
    def shapes_of(cls, linear: nn.Linear | Conv1D, r: int) -> dict[str, tuple[int, ...]]:
        """The same, for a layer that has no adapter yet."""
        shape = weight_of(linear).shape
        return cls.shapes(*(reversed(shape) if isinstance(linear, Conv1D) else shape), r)

    @property
    def base_weight(self) -> Weight:
        """The frozen weight [out_features, in_features]: a view of the base layer's, or how its format is read."""
        weight = weight_of(self if self.base_layer is None else self.base_layer, nf4_parity=self.nf4_parity)
        return weight.T if self.fan_in_fan_out else weight

    def plan(self, tokens: int) -> dispatch.Plan:
        """What a call with `tokens` rows would run in the layer's present mode, and why."""
        weight = self.base_weight
        problem = problem_of(
            weight,
            self.lora_A,
            self.magnitude,
            self.bias,
            tokens=tokens,
            dtype=self.base_dtype,
            dropout=self.dropout_mode if self.training and self.lora_dropout > 0 else None,
            trains=self.training and any(parameter.requires_grad for parameter in self.parameters()),
            merge_aware=self.merge_aware,
        )
        return dispatch.explained(dispatch.choose(problem, self.space, self.impl), weight)

    def as_member(self, dtype: torch.dtype) -> Member | str:
        """The layer as a block of layers computes it for an input in `dtype`, or why it runs alone at this call."""
        if reason := why_wrapped(self, kept=True):
            return reason
        if self.training and self.lora_dropout > 0:
            return "has dropout"
        if self.merge_aware:
            return "quantises its merged weight (merge_aware)"
        if self.frozen_scale is not None:
            return "keeps its norm inside frozen_adapters"
        if self.compute_dtype not in (None, dtype):
            return f"computes in {self.compute_dtype}"
        if is_offloaded(self):
            return "is offloaded"
        factors = self.lora_A, self.lora_B, self.magnitude
        rounding = Rounding(self.rounding, self.salt)
        return Member(self.base_weight, *factors, self.bias, self.scaling, rounding, self.output_use)

    @property
    def base_dtype(self) -> torch.dtype:
        """Of what the layer computes outside autocast."""
        return self.compute_dtype or self.base_weight.dtype

    @property
    def keeps_dtype(self) -> bool:
        """Whether it answers in the dtype of its input, under autocast too."""
        return self.compute_dtype is not None

    @property
    def block_options(self) -> BlockOptions:
        """What a block of this layer runs with."""
        return BlockOptions(self.space, self.impl)

    @classmethod
    def from_linear(cls, linear: nn.Linear | Conv1D, *, r: int, lora_alpha: float, **options) -> "DoraLinear":
        """Wraps `linear` without copying: its weight and bias become this layer's, frozen.

        Raises:
            TypeError: `linear` is neither an `nn.Linear` nor a `transformers` `Conv1D`.
            ValueError: its weight is computed, or of a type or dtype that is not known here.
        """
        below = needs_its_layer(linear)
        if not isinstance(linear, LINEAR_CLASSES) and not below:
            raise TypeError(f"from_linear takes an nn.Linear or a transformers Conv1D, got {type(linear).__name__}")
        if not needs_its_layer(linear) and not is_quantized(linear) and (reason := why_not_format(linear)):
            raise ValueError(f"from_linear cannot adapt a layer that {reason}")
        options |= {"r": r, "lora_alpha": lora_alpha, "fan_in_fan_out": isinstance(linear, Conv1D)}
        if below:
            layer = cls(None, bias_of(linear), base_layer=linear, **options)
            keep_packed(linear)
        else:
            # bitsandbytes' 4-bit layers compute in a dtype of their own where the user set one.
            layer = cls(linear.weight, linear.bias, compute_dtype=getattr(linear, "compute_dtype", None), **options)
        return layer.train(linear.training)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T.contiguous() if self.fan_in_fan_out else matrix

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def to_plain(self, base: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> nn.Linear | Conv1D:
        """A plain layer with the merged weight and the base layer's bias: a `Conv1D` for one, else an `nn.Linear`;
        `base` and `dtype` as in `merged_weight`."""
        weight = self.from_matrix(self.merged_weight(dtype or self.base_weight.dtype, base))
        weight = nn.Parameter(weight, requires_grad=False)
        with torch.device("meta"):
            if self.fan_in_fan_out:
                linear = Conv1D(self.out_features, self.in_features)
            else:
                linear = nn.Linear(self.in_features, self.out_features)
        # Conv1D always has a bias; nn.Linear takes None.
        linear.weight, linear.bias = weight, self.bias
        return linear.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.shared_call is not None and (y := self.shared_call.output(self, x)) is not None:
            return y
        self.refuse_offloaded()
        y = dora_linear(
            x if self.compute_dtype is None else x.to(self.compute_dtype),
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
            output_use=self.output_use,
            merge_aware=self.merge_aware,
        )
        return y.to(x.dtype) if self.keeps_dtype else y
