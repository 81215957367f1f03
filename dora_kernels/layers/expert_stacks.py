"""The fused parameters of an experts' module: each a stack of matrices, one of each expert."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor  # counting

from ..ops.base_weights import is_fp8_experts, read_fp8_stack, sharding_of, why_not_fp8_stack
from ..ops.stacks import Stack

STACKS = ("gate_up_proj", "up_proj", "down_proj")
"""The fused parameters that the registry's functions read."""
DEQUANTIZED = {"Mxfp4GptOssExperts": "load the model with quantization_config=Mxfp4Config(dequantize=True)"}
"""By the class of experts that keep their stacks packed, how they are had in 16 bits."""


def parameter_names(module: nn.Module) -> list[str]:
    """The module's own parameters, and stacks that are none of them: computed, or packed in other objects."""
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    packed = [name for name in STACKS if type(module).__name__ in DEQUANTIZED and hasattr(module, name)]
    # Not read: that would compute them.
    return list(dict.fromkeys([*own, *getattr(module, "parametrizations", ()), *packed]))


def experts_per_token(experts: nn.Module) -> int | None:
    """The number of experts that a token goes to, where the model's config says so."""
    chosen = getattr(experts.config, "num_experts_per_tok", None)
    return chosen if isinstance(chosen, int) else None


def stack_and_bias(experts: nn.Module, name: str) -> tuple[Stack, torch.Tensor | None]:
    """W [E, out_features, in_features], a view of the parameter where that is transposed, and b [E, out_features]."""
    if is_fp8_experts(experts):  # these have no biases
        return read_fp8_stack(experts, name), None
    stack = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    return (stack.mT if experts.is_transposed else stack), bias


def why_not_experts(module: nn.Module, name: str) -> str | None:
    """Why the parameter `name` of `module` is no stack that can be adapted, as what follows its name; None if it is."""
    stack, kind = module._parameters.get(name), type(module).__name__
    instead = DEQUANTIZED.get(kind, "load the experts in 16 bits")
    if stack is None:
        return f"is no parameter but computed or packed in {kind}: {instead}"
    if sharding := sharding_of(stack):
        return f"is {sharding}"
    is_plain = type(stack) in (nn.Parameter, FakeTensor) and stack.is_floating_point() and stack.element_size() > 1
    if is_fp8_experts(module) and name in STACKS:
        if reason := why_not_fp8_stack(module, name):
            return f"{reason}; {instead}"
    elif not is_plain:
        return f"is quantised ({type(stack).__name__} of {stack.dtype} in {kind}): {instead}"
    if stack.ndim != 3:
        return f"has shape {list(stack.shape)}: only stacks of experts [experts, …, …] can be adapted"
    if name not in STACKS or not hasattr(module, "is_transposed") or not hasattr(module, "config"):
        return f"is in {kind}, which transformers does not compute through its registry of experts"
    if getattr(module, "_is_expert_parallel", False):
        return "is split over processes (expert parallelism)"
    return None
