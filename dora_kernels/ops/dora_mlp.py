"""`dora_mlp`: a gated MLP of DoRA layers as one operation, y = down(act(gate(x)) ⊙ up(x)), and its gradient.

    forward    a = act(gate(x)) ⊙ up(x)    `gate_up`, one pass over the products of gate and up
               y = down(a)                 `forms`
    backward   da                          `forms`, of dy
               the gradients of gate's and up's products, their dm and dB, and a again    `gate_up`, one pass over da
               down's dm, dB and dA        `forms`, of dy and a
               dA and dx                   `gate_up`

Kept in between are x, the products [M, 2 I] and down's output: neither act(gate) nor a, nor what gate and up return.
Symbols are those of `dora_linear`; I is the intermediate size.
"""

import math
from typing import NamedTuple

import torch

from . import dispatch, forms, gate_up
from .accumulation import kept_norm
from .call import Call, Gradients, Inputs, Saved
from .checks import dtype_of_call
from .members import (
    Member,
    constants_of,
    members_of,
    tensors_of,
    why_not_together,
    with_quantized,
    without_quantized,
)
from .output import OutputUse, note_written, shared_with_the_model
from .overhead import glu_overhead
from .problem import problem_of
from .recomputation import remembered_norm
from .types import Rounding

ACTIVATIONS = ("silu", "gelu_tanh")


class MlpCall(NamedTuple):
    """The constants of one call. `constants` are each member's scaling, rounding and use, down last."""

    space: str  # of gate and up
    activation: str
    constants: tuple[tuple[float, Rounding, OutputUse | None], ...]
    down: Call


class DoraMlpFunction(torch.autograd.Function):
    """y [M, N] of x [M, K], and the gradients of x and of each member's A, B and m.

    `tensors` are W, A, B, m and b of gate and up, or of the layer that holds both, and of down.
    """

    @staticmethod
    def forward(ctx, x, call, *tensors):
        *group, down = members_of(tensors, call.constants)
        ops = dispatch.implementation(call.down.impl)
        form = forms.token_forward if call.down.space == "token" else forms.weight_forward
        with dispatch.on_device_of(x), dispatch.without_autocast(x.device):
            a, saved = gate_up.gate_up_forward(
                ops, call.space, call.activation, x, group, needs_x=ctx.needs_input_grad[0]
            )
            given = remembered_norm(down.use, down.factors, down.scaling)
            if given is None:
                given = kept_norm(ops, down.use, down.weight, down.factors, down.scaling)
            y, saved_down = form(ops, call.down, Inputs(a, None, *down.factors, down.bias, down.weight, given), ASKED)
        # `a` is made again, and the weight is among the members.
        saved_down, ctx.writes = saved_down._replace(lora_x=None, weight=None), None
        if saved_down.output is y:
            y, kept, ctx.writes = shared_with_the_model(y, call.down.output_use)
            saved_down = saved_down._replace(output=kept)
        ctx.call = call
        tensors, ctx.quantized = without_quantized(tensors)
        ctx.save_for_backward(*saved, *saved_down, *tensors)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("dora_mlp cannot differentiate twice: call backward without create_graph=True")
        call, (saved, saved_down, tensors) = ctx.call, _split(ctx.saved_tensors)
        *group, down = members_of(with_quantized(tensors, ctx.quantized), call.constants)
        saved_down = saved_down._replace(weight=down.weight)
        ops, in_token_space = dispatch.implementation(call.down.impl), call.down.space == "token"
        asked = Gradients(grad_y.dtype, None, down.lora_A.dtype, down.lora_B.dtype, down.magnitude.dtype, None)
        with dispatch.on_device_of(grad_y), dispatch.without_autocast(grad_y.device):
            if ctx.writes is not None and ctx.writes.has_moved:
                note_written(call.down.output_use, can_repeat=True)
                a = gate_up.activated(ops, call.space, call.activation, saved, group)
                saved_down = saved_down._replace(output=None, lora_x=a)
            if in_token_space:
                of_down, grad_h = forms.token_backward_without_A(ops, call.down, grad_y, saved_down, asked)
                a = of_down.x
            else:
                merged, saved_down = forms.merged_with_A(ops, call.down, saved_down, grad_y.dtype)
                a = grad_y @ merged
                del merged
            # Until here `a` is da.
            of_group = gate_up.gate_up_backward(ops, call.space, call.activation, a, saved, group)
            if in_token_space:
                of_down = of_down._replace(lora_A=forms.grad_A_of(grad_h, a, asked.lora_A))
            else:
                saved_down = saved_down._replace(lora_x=a)
                of_down = forms.weight_backward(ops, call.down, grad_y, saved_down, asked._replace(x=None))
            del a, saved_down
            grad_x, grads_A = gate_up.gate_up_outer_gradients(
                ops, call.space, of_group, saved, group, needs_x=ctx.needs_input_grad[0]
            )
        parts = len(group)
        found = zip(grads_A, of_group.lora_B.chunk(parts), of_group.magnitude.chunk(parts))
        factors = [*found, (of_down.lora_A, of_down.lora_B, of_down.magnitude)]
        return grad_x, None, *(gradient for three in factors for gradient in (None, *three, None))


ASKED = Gradients(True, None, True, True, True, False)
"""Of down: a block's factors all train, and its biases do not."""


def _split(tensors):
    first, second = len(gate_up.Saved._fields), len(Saved._fields)
    saved, saved_down = tensors[:first], tensors[first : first + second]
    return gate_up.Saved(*saved), Saved(*saved_down), tensors[first + second :]


def why_not_mlp(device: torch.device, gate: Member, up: Member | None, down: Member) -> str | None:
    """Why these layers are no gated MLP that `dora_mlp` computes for an input on `device`, or None."""
    group = [gate] if up is None else [gate, up]
    if reason := why_not_together([*group, down], device):
        return reason
    if up is None and gate.features % 2:
        return "the layer of gate and up has an odd number of features"
    if up is not None:
        if gate.features != up.features or gate.rank != up.rank:
            return "gate and up differ in their features or their rank"
        if gate.scaling != up.scaling:
            return "gate and up differ in their scaling"
        if (gate.bias is None) != (up.bias is None):
            return "one of gate and up has a bias"
        if gate.lora_A.shape[1] != up.lora_A.shape[1]:
            return "gate and up have inputs of several sizes"
    if down.lora_A.shape[1] != sum(member.features for member in group) // 2:
        return "down has other inputs than gate and up have features"
    return None


def dora_mlp(
    x: torch.Tensor,
    gate: Member,
    up: Member | None,
    down: Member,
    *,
    activation: str,
    space: str = "auto",
    impl: str = "auto",
) -> torch.Tensor:
    """down(act(gate(x)) ⊙ up(x)), each a DoRA layer as `dora_linear` computes it. Differentiable once, in x and in each
    layer's A, B and m.

    Args:
        x: [..., K], fp16, bf16, fp32 or fp64; cast to autocast's dtype where autocast is on.
        gate, up: layers of K inputs and I features, of one rank and one scaling. `up` is None where `gate` holds both
            in its 2 I features, gate first.
        down: a layer of I inputs.
        activation: act, "silu" or "gelu_tanh".
        space, impl: see `dora_linear`; `space` is that of all three layers.

    Returns:
        [..., out_features] in x's dtype (under autocast: autocast's).

    Raises:
        ValueError: layers that do not fit; a factor that does not train, or a bias that does.
        TypeError: x and a dense weight of two dtypes outside autocast.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if reason := why_not_mlp(x.device, gate, up, down):
        raise ValueError(f"dora_mlp cannot compute these layers together: {reason}")
    group, inputs = [gate] if up is None else [gate, up], gate.lora_A.shape[1]
    if x.ndim < 1 or x.shape[-1] != inputs:
        raise ValueError(f"x must be [..., in_features] = [..., {inputs}], got shape {list(x.shape)}")
    dtype, tokens = dtype_of_call(x, gate.weight), math.prod(x.shape[:-1])
    plan = plan_mlp(gate, up, down, tokens=tokens, dtype=dtype, space=space, impl=impl)
    members = [*group, down]
    down_call = Call(plan.down.space, plan.down.impl, down.scaling, down.rounding, None, True, down.use)
    call = MlpCall(plan.gate_up.space, activation, constants_of(members), down_call)
    y = DoraMlpFunction.apply(x.to(dtype).reshape(tokens, x.shape[-1]), call, *tensors_of(members))
    return y.view(*x.shape[:-1], y.shape[-1])


class MlpPlan(NamedTuple):
    """What runs for gate and up, and for down, and why."""

    gate_up: dispatch.Plan
    down: dispatch.Plan


def plan_mlp(
    gate: Member, up: Member | None, down: Member, *, tokens: int, dtype: torch.dtype, space: str, impl: str
) -> MlpPlan:
    """What `dora_mlp` runs on `tokens` rows in `dtype`. Raises ValueError as `dispatch.choose`."""
    problems = [
        problem_of(
            member.weight, member.lora_A, member.magnitude, member.bias,
            tokens=tokens, dtype=dtype, dropout=None, trains=True,
        )
        for member in (gate, down)
    ]  # fmt: skip
    features = gate.features if up is None else 2 * gate.features
    first = dispatch.choose(problems[0]._replace(out_features=features), space, impl, glu_overhead)
    return MlpPlan(first, dispatch.choose(problems[1], space, impl))
