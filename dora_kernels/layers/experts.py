"""DoRA on fused experts: `DoraExperts` adapts one 3-D parameter, and transformers' registry leads to it.

transformers keeps a layer's experts in one module with a stack for each of their linear layers, and asks a registry by
the name in the module's config for the function that computes them. An adapted module gets a config of its own that
names ours: the model's other experts keep theirs, and switching the model's implementation leaves an adapter in place.
"""

import copy
import math

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily  # counting
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..ops import dispatch
from ..ops.base_weights import is_fp8_experts
from ..ops.dora_experts import ACTIVATIONS, dora_experts, plan_experts
from ..ops.output import OutputUse
from ..ops.stacks import Stack, stack_mm, stack_norm
from ..ops.types import NormScale, Rounding
from .expert_stacks import experts_per_token, stack_and_bias
from .frozen import Freezable
from .support import why_wrapped

IMPLEMENTATION = "dora_kernels"
"""The name in transformers' registry."""


class DoraExperts(Freezable):
    """A, B and m of one fused parameter, the stack W [E, out_features, in_features] of a layer of E experts.

    The stack stays where it was, in the experts' module, under its own name and in its own layout. `lora_A` [E, r, in],
    `lora_B` [E, out, r] and `magnitude` [E, out] are trained.

    Args:
        experts: the module that holds the stack.
        name: the stack's name in it.
        r: rank of each expert, at least 1.
        lora_alpha: the scaling s is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
        space, impl, rounding, salt: see `dora_experts`.
    """

    def __init__(
        self,
        experts: nn.Module,
        name: str,
        *,
        r: int,
        lora_alpha: float,
        use_rslora: bool = False,
        space: str = "auto",
        impl: str = "auto",
        rounding: str = "dithered",
        salt: int = 0,
    ):
        super().__init__()
        # In a tuple: the experts' module holds this one.
        self._owner, self.name = (experts,), name
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.space, self.impl, self.rounding, self.salt, self.output_use = space, impl, rounding, salt, OutputUse()
        self.fused_gate: tuple[nn.Module, str] | None = None  # the activation, and its name: see `fuse_gates`
        E, N, K = self.stack.shape
        dtype = torch.float64 if self.stack.dtype == torch.float64 else torch.float32
        options = {"device": self.stack.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(E, r, K, **options))
        self.lora_B = nn.Parameter(torch.zeros(E, N, r, **options))
        self.magnitude = nn.Parameter(torch.empty(E, N, **options))
        self.reset_adapter()

    @property
    def experts(self) -> nn.Module:
        """The module that holds the stack."""
        return self._owner[0]

    @property
    def stack(self) -> Stack:
        """The frozen W [E, out_features, in_features], a view of the parameter where that is transposed."""
        return stack_and_bias(self.experts, self.name)[0]

    @property
    def why_not_merged(self) -> str | None:
        """Why W' cannot take the stack's place, as what follows "it"; None if it can."""
        if isinstance(self.stack, torch.Tensor):
            return None
        return (
            "is a stack in FP8, in whose place transformers' module takes no matrices: load the base with "
            "quantization_config=FineGrainedFP8Config(dequantize=True), and the adapter onto that"
        )

    @property
    def scaling(self) -> float:
        """s: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Draws A (PEFT's Kaiming uniform), zeroes B and sets m to ‖W‖, so that the experts equal those of the base."""
        nn.init.kaiming_uniform_(self.lora_A.flatten(0, 1), a=math.sqrt(5))
        self.lora_B.zero_()
        if self.lora_A.device.type != "meta":
            self.magnitude.copy_(self.weight_norm().norm)

    def weight_norm(self) -> NormScale:
        """n = ‖W + s B A‖ and g = m / n, both [E, out_features], fp32 (fp64 for an fp64 stack)."""
        factors = self.lora_A, self.lora_B, self.magnitude
        with dispatch.operations_for(self.stack, self.impl) as (ops, stack):
            return stack_norm(ops, stack, *factors, self.scaling)

    def expert_norm(self, expert: int) -> NormScale:
        """n and g of one expert, both [out_features]."""
        alone = slice(expert, expert + 1)
        factors = self.lora_A[alone], self.lora_B[alone], self.magnitude[alone]
        with dispatch.operations_for(self.stack, self.impl) as (ops, stack):
            norms = stack_norm(ops, stack[alone], *factors, self.scaling)
        return NormScale(norms.norm[0], norms.scale[0])

    @property
    def activation(self) -> str | None:
        """Of the gate, where the call computes act(gate) ⊙ up, too: not where it was replaced or hooked since."""
        function, name = self.fused_gate or (None, None)
        is_own = name is not None and self.experts.act_fn is function
        return name if is_own and why_wrapped(function, kept=True) is None else None

    def stack_plan(self, tokens: int) -> dispatch.Plan:
        """What a call runs on so many of the model's tokens in the present mode."""
        stack, bias = stack_and_bias(self.experts, self.name)
        return plan_experts(
            stack, self.lora_A, self.magnitude, bias, tokens=self._rows(tokens), dtype=stack.dtype,
            trains=self.training, space=self.space, impl=self.impl, gated=self.activation is not None,
        )  # fmt: skip

    def _rows(self, tokens: int) -> int:
        """Tokens, each counted once for each of its experts."""
        return tokens * (experts_per_token(self.experts) or 1)

    def reason(self, tokens: int) -> str:
        """`stack_plan`, why, and what it takes for granted."""
        plan, rows = self.stack_plan(tokens), self._rows(tokens)
        gate = f"; {self.activation}(gate) ⊙ up in the same pass" if self.activation and plan.space == "token" else ""
        return f"{plan.reason}{gate}; {rows / len(self.stack):g} tokens an expert, if they are spread evenly"

    def merged_expert(self, expert: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W' = g ⊙ (W + s B A) [out_features, in_features] of one expert, in fp32, rounded once to `dtype`, or to the
        stack's."""
        return dispatch.merged_weight(
            self.stack[expert], self.lora_A[expert], self.lora_B[expert], self.magnitude[expert], self.scaling,
            dtype=dtype, rounding=Rounding(self.rounding, self.salt + expert), impl=self.impl,
        )  # fmt: skip

    def forward(self, x: torch.Tensor, stack: Stack, bias: torch.Tensor | None, ends: torch.Tensor) -> torch.Tensor:
        """[S, out_features] of tokens [S, in_features] sorted by expert, in the stack's dtype, or act(gate) ⊙ up of
        them; `ends` as in `dora_experts`. The module that is called gives its own stack and bias: a replica has
        others."""
        return dora_experts(
            x.to(stack.dtype), stack, self.lora_A, self.lora_B, self.magnitude, ends,
            scaling=self.scaling, bias=bias, space=self.space, impl=self.impl, rounding=self.rounding,
            training=self.training, salt=self.salt, frozen_scale=self.frozen_scale, output_use=self.output_use,
            activation=self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        experts, out_features, in_features = self.stack.shape
        return f"experts={experts}, {out_features}×{in_features}, r={self.r}, scaling={self.scaling:g}"


class Adapters(nn.ModuleDict):
    """The `DoraExperts` of one experts' module, by the parameter's name, and the config it had."""

    def __init__(self, adapters: dict[str, DoraExperts], config):
        super().__init__(adapters)
        self.base_config = config


def adapt_experts(experts: nn.Module, adapters: dict[str, DoraExperts]) -> None:
    """Lets the experts' module compute with `adapters`."""
    if is_fp8_experts(experts):
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS  # slow to import

        ALL_FP8_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, dora_experts_forward)
    experts.dora = Adapters(adapters, experts.config)
    experts.config = copy.copy(experts.config)
    experts.config._experts_implementation_internal = IMPLEMENTATION


def fuse_gates(model: nn.Module) -> None:
    """Lets the adapters of gate and up compute act(gate) ⊙ up, where that is all that their module makes of them."""
    for adapter in adapted_experts(model).values():
        if adapter.name == "gate_up_proj":
            name = _activation_of_gate(adapter.experts)
            adapter.fused_gate = None if name is None else (adapter.experts.act_fn, name)


def unfuse_gates(model: nn.Module) -> None:
    """Undoes `fuse_gates`."""
    for adapter in adapted_experts(model).values():
        adapter.fused_gate = None


def _activation_of_gate(experts: nn.Module) -> str | None:
    own_gate = type(experts)._apply_gate.__module__ != ALL_EXPERTS_FUNCTIONS.__module__
    if own_gate or experts.has_bias or list(experts.act_fn.parameters()):
        return None
    with unset_fake_temporarily():  # a model may be planned on tensors without values
        y = experts.act_fn(x := torch.linspace(-4, 4, 17, dtype=torch.float64, device="cpu"))
        return next((name for name, function in ACTIVATIONS.items() if torch.equal(y, function(x))), None)


def release_experts(experts: nn.Module) -> None:
    """Undoes `adapt_experts`."""
    experts.config = experts.dora.base_config
    del experts.dora


def adapted_experts(model: nn.Module) -> dict[str, DoraExperts]:
    """The adapters of fused parameters, by the parameters' names."""
    return {
        f"{path}.{name}".strip("."): adapter
        for path, module in model.named_modules()
        if isinstance(getattr(module, "dora", None), Adapters)
        for name, adapter in module.dora.items()
    }


def frozen_experts(model: nn.Module) -> dict[str, int]:
    """The modules that hold experts as stacks in 3-D parameters without an adapter, and the elements of these."""
    found = {}
    for path, module in model.named_modules():
        if not isinstance(module, DoraExperts) and "expert" in f"{path} {type(module).__name__}".lower():
            own = {name: p for name, p in module._parameters.items() if p is not None and p.ndim == 3}
            scales = {f"{name}_scale_inv" for name in own}
            stacks = [p.numel() for name, p in own.items() if name not in {*getattr(module, "dora", ()), *scales}]
            if stacks:
                found[path] = sum(stacks)
    return found


def dora_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts' module's forward, as transformers' own functions compute it: `self` is the module.

    Raises:
        ValueError: no adapter in it.
    """
    if not isinstance(getattr(self, "dora", None), Adapters):
        raise ValueError(f'experts_implementation="{IMPLEMENTATION}" is for experts that apply_dora adapted')
    tokens, top_k = hidden_states.shape[0], top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    numbers = torch.arange(self.num_experts, device=experts.device, dtype=experts.dtype)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    product = _linear(self, first, hidden_states[order // top_k], experts, ends)
    activated = product
    if first not in self.dora or self.dora[first].activation is None:
        activated = self._apply_gate(product) if self.has_gate else self.act_fn(product)
    out = _linear(self, "down_proj", activated, experts, ends)
    if getattr(self, "has_post_expert_norm", False):
        out = self.post_expert_norm(out)
    out = out * top_k_weights.reshape(-1)[order, None]
    # Each token's own sum in a fixed order: an index_add would add in any.
    restored = torch.empty_like(order)
    restored[order] = torch.arange(len(order), device=order.device)
    return out[restored].view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, dora_experts_forward)


def _linear(module, name, x, experts, ends):
    """x W_eᵀ + b_e of sorted tokens, with the adapter where there is one."""
    stack, bias = stack_and_bias(module, name)
    if name in module.dora:
        return module.dora[name](x, stack, bias, ends)
    y = FrozenExperts.apply(x.to(stack.dtype), stack, ends)
    return y if bias is None else y + bias[experts]


class FrozenExperts(torch.autograd.Function):
    """x W_eᵀ of sorted tokens with a stack [E, out, in] that does not train."""

    @staticmethod
    def forward(ctx, x, stack, ends):
        ctx.quantized = None if isinstance(stack, torch.Tensor) else stack
        ctx.save_for_backward(stack if ctx.quantized is None else None, ends)
        return _product(x, stack, ends, transposed=True)

    @staticmethod
    def backward(ctx, grad_y):
        stack, ends = ctx.saved_tensors
        return _product(grad_y, stack if ctx.quantized is None else ctx.quantized, ends, transposed=False), None, None


def _product(x, stack, ends, transposed):
    ops = dispatch.implementation(dispatch.choose_impl(x.device)[0])
    with dispatch.on_device_of(x), dispatch.without_autocast(x.device):
        return stack_mm(ops, x, stack, ends, transposed=transposed)
