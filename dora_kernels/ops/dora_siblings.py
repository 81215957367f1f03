"""`dora_siblings`: DoRA layers of one input as one operation, such as attention's queries, keys and values.

    token space     h = x Aᵀ of all layers, one GEMM; z = x Wᵀ and y = g ⊙ (z + s h Bᵀ) + b of each
    weight space    x W'ᵀ of all layers, one GEMM, whose columns are each layer's y
    backward        dm and dB of each layer, in one pass over its dy; dh of all, dA = dhᵀ x, one GEMM; dx, one sum

Kept in between are x, once, and what each layer keeps alone. Symbols are those of `dora_linear` and `members`.
"""

import math
from typing import NamedTuple

import torch

from . import dispatch, siblings
from .call import Call
from .checks import dtype_of_call
from .members import (
    TENSORS,
    Member,
    constants_of,
    members_of,
    tensors_of,
    why_not_together,
    with_quantized,
    without_quantized,
)
from .problem import problem_of
from .siblings import Saved


class SiblingsCall(NamedTuple):
    """The constants of one call; `constants` are each member's."""

    space: str
    impl: str
    constants: tuple[tuple, ...]

    def of(self, members: list[Member]) -> list[Call]:
        """The members' own calls."""
        return [Call(self.space, self.impl, each.scaling, each.rounding, None, True, each.use) for each in members]


class DoraSiblingsFunction(torch.autograd.Function):
    """Each layer's y [M, N] of x [M, K], and the gradients of x and of each layer's A, B and m.

    `tensors` are W, A, B, m and b of each. A layer whose y is not used gets no gradient.
    """

    @staticmethod
    def forward(ctx, x, call, *tensors):
        members, ops = members_of(tensors, call.constants), dispatch.implementation(call.impl)
        with dispatch.on_device_of(x), dispatch.without_autocast(x.device):
            if call.space == "token":
                outputs, saved, ctx.writes = siblings.token_forward(ops, call.of(members), x, members)
            else:
                needs_x = ctx.needs_input_grad[0]
                outputs, saved, ctx.writes = siblings.weight_forward(ops, x, members, needs_x=needs_x)
        ctx.call = call
        tensors, ctx.quantized = without_quantized(tensors)
        ctx.save_for_backward(*tensors, *saved.tensors())
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("dora_siblings cannot differentiate twice: call backward without create_graph=True")
        # Read once: a checkpoint gives each tensor away a single time.
        call, tensors, count = ctx.call, ctx.saved_tensors, TENSORS * len(grads)
        tensors, saved = tensors[:count], Saved.of(tensors[count:])
        members = members_of(with_quantized(tensors, ctx.quantized), call.constants)
        ops, x = dispatch.implementation(call.impl), saved.x
        with dispatch.on_device_of(x), dispatch.without_autocast(x.device):
            grad_x, factors = siblings.backward(
                ops,
                call.of(members),
                [x.new_zeros(len(x), each.features) if grad is None else grad for each, grad in zip(members, grads)],
                saved,
                members,
                ctx.writes,
                needs_x=ctx.needs_input_grad[0],
            )
        asked = [three if grad is not None else (None, None, None) for grad, three in zip(grads, factors)]
        return grad_x, None, *(gradient for three in asked for gradient in (None, *three, None))


def why_not_siblings(device: torch.device, members: list[Member]) -> str | None:
    """Why `dora_siblings` does not compute these layers for an input on `device`, or None."""
    if reason := why_not_together(members, device):
        return reason
    if len({member.lora_A.shape[1] for member in members}) > 1:
        return "its layers have inputs of several sizes"
    if any(member.use is not None and member.use.is_written for member in members):
        return "the model writes over an output"
    return None


def dora_siblings(
    x: torch.Tensor, members: list[Member], *, space: str = "auto", impl: str = "auto"
) -> tuple[torch.Tensor, ...]:
    """Each layer's output for x, as `dora_linear` computes it. Differentiable once, in x and each layer's A, B and m.

    Args:
        x: [..., K], fp16, bf16, fp32 or fp64; cast to autocast's dtype where autocast is on.
        members: layers of K inputs; their features, ranks, scalings and biases may differ.
        space, impl: see `dora_linear`; `space` is that of all layers.

    Returns:
        For each layer [..., out_features] in x's dtype (under autocast: autocast's). In weight space the layers without
        a bias share memory: their rows are ΣN elements apart. A model that writes over one changes no other.

    Raises:
        ValueError: layers that do not fit; a factor that does not train, or a bias that does. TypeError: x and a dense
            weight of two dtypes outside autocast.
    """
    if reason := why_not_siblings(x.device, members):
        raise ValueError(f"dora_siblings cannot compute these layers together: {reason}")
    inputs = members[0].lora_A.shape[1]
    if x.ndim < 1 or x.shape[-1] != inputs:
        raise ValueError(f"x must be [..., in_features] = [..., {inputs}], got shape {list(x.shape)}")
    dtype, tokens = dtype_of_call(x, members[0].weight), math.prod(x.shape[:-1])
    plan = plan_siblings(members, tokens=tokens, dtype=dtype, space=space, impl=impl)
    call = SiblingsCall(plan.space, plan.impl, constants_of(members))
    outputs = DoraSiblingsFunction.apply(x.to(dtype).reshape(tokens, inputs), call, *tensors_of(members))
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def plan_siblings(members: list[Member], *, tokens: int, dtype: torch.dtype, space: str, impl: str) -> dispatch.Plan:
    """What `dora_siblings` runs on `tokens` rows in `dtype`, and why. Raises ValueError as `dispatch.choose`.

    By what one layer would cost with all features, and with the rank that gives B A as many products.
    """
    first, features = members[0], sum(member.features for member in members)
    problem = problem_of(
        first.weight, first.lora_A, first.magnitude, None, tokens=tokens, dtype=dtype, dropout=None, trains=True
    )
    problem = problem._replace(
        out_features=features,
        rank=math.ceil(sum(member.features * member.rank for member in members) / features),
        has_bias=any(member.bias is not None for member in members),
    )
    return dispatch.choose(problem, space, impl)
