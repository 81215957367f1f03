"""`dora_experts`: DoRA of a stack of experts, each token with its own, and its gradient.

Of expert e, with the equations and the symbols of `dora_linear`, for its tokens alone:

    forward    y = g_e ⊙ (x W_eᵀ + s x A_eᵀ B_eᵀ) + b_e      g_e = m_e / n_e      n_e = ‖W_e + s B_e A_e‖, detached
    backward   dm_e, dB_e, dA_e: sums over the expert's tokens      dx = dh A_e + dZ W_e

Where N are the features of gate and of up, act(gate) ⊙ up of them may take the place of y: in token space that is the
same pass, and z is kept, not y.

The stack W [E, N, K] is read and never written: nothing of its size is made, forward or backward. Token space takes one
pass over the outputs of all experts. Weight space writes W' of one expert after the other, over the last one's. A stack
in FP8 is decoded one expert after the other in either form.

E is the number of experts, S that of tokens, each counted once for each of its experts.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import dispatch
from .base_weights import Fp8Stack, note_of, sharding_of
from .checkpointing import is_selective
from .grouped import expert_rows, grouped_mm
from .output import OutputUse
from .overhead import experts_overhead
from .problem import Problem
from .recomputation import remember_norm, remembered_norm
from .stacks import Stack, merged_mm, stack_mm, stack_norm
from .types import NormScale, Rounding

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class Call(NamedTuple):
    """The constants of one call."""

    space: str
    impl: str
    scaling: float
    rounding: Rounding
    trains: bool
    use: OutputUse | None
    activation: str | None  # of gate, where act(gate) ⊙ up is returned in token space


class DoraExpertsFunction(torch.autograd.Function):
    """y [S, N] and the gradients of x, A, B and m.

    dm is read off y without its bias. In token space with a bias, and in fp16, that is not exact: there z is kept, and
    so it is where act(gate) ⊙ up [S, N / 2] is returned.
    """

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, magnitude, weight, bias, ends, given, call):
        ops = dispatch.implementation(call.impl)
        needs = ctx.needs_input_grad[:4] if call.trains else (False,) * 4
        with dispatch.on_device_of(x), dispatch.without_autocast(x.device):
            norms = given
            if norms is None:
                norms = stack_norm(ops, weight, lora_A, lora_B, magnitude, call.scaling, ends=ends)
                remember_norm(call.use, (lora_A, lora_B, magnitude), call.scaling, norms)
            A, h, keeps_base = lora_A, None, False
            if call.space == "weight":
                factors = lora_A, lora_B, norms, call.scaling, call.rounding
                y = output = merged_mm(ops, x, weight, *factors, ends, transposed=True)
                if bias is not None:
                    y = _with_bias(output, bias, ends, in_place=not needs[3])
            else:
                A = _cast(ops, call, lora_A, x.dtype)
                base_out, h = stack_mm(ops, x, weight, ends, transposed=True), grouped_mm(x, A.mT, ends)
                if call.activation is not None:
                    keeps_base = True
                    factors = h, lora_B, norms.scale, call.scaling, ends
                    y = ops.expert_glu_fwd(base_out, *factors, activation=call.activation)
                else:
                    keeps_base = needs[3] and (bias is not None or x.dtype == torch.float16)
                    y = ops.expert_rescale_fwd(
                        base_out, h, lora_B, norms.scale, bias, call.scaling, ends,
                        in_place=not (keeps_base or is_selective()), rounding=call.rounding,
                    )  # fmt: skip
                output = base_out if keeps_base else y
        ctx.call, ctx.dtypes = call, [tensor.dtype for tensor in (x, lora_A, lora_B, magnitude)]
        ctx.is_base, derives = keeps_base, call.activation is not None and any(needs)
        # A quantised stack is no tensor: memory that nothing here writes.
        ctx.quantized = None if isinstance(weight, torch.Tensor) else weight
        ctx.save_for_backward(
            # In weight space h waits for the backward: dB alone reads it.
            x if needs[1] or (h is None and needs[2]) else None,
            h if needs[2] or needs[3] or derives else None,
            output if needs[3] or derives else None,
            A, lora_B, *norms, weight if ctx.quantized is None else None, ends,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx, grad_y):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("dora_experts cannot differentiate twice: call backward without create_graph=True")
        call, (x, h, product, A, lora_B, norm, scale, weight, ends) = ctx.call, ctx.saved_tensors
        weight = weight if ctx.quantized is None else ctx.quantized
        ops, (E, N, R), in_weight_space = dispatch.implementation(call.impl), lora_B.shape, call.space == "weight"
        needs_x, needs_A, needs_B, needs_m = ctx.needs_input_grad[:4]
        # s g ⊙ B is rounded once; in fp16 it may underflow while B is young, so there g comes in through dZ.
        through_base = grad_y.dtype == torch.float16 and not in_weight_space
        with dispatch.on_device_of(grad_y), dispatch.without_autocast(grad_y.device):
            if call.activation is not None:
                factors = h, lora_B, scale, call.scaling, ends
                grad_y = ops.expert_glu_bwd(grad_y, product, *factors, activation=call.activation)
            if h is None and needs_B:
                h = grouped_mm(x, _cast(ops, call, A, x.dtype).mT, ends)
            grad_m, grad_B, grad_base = ops.expert_rescale_bwd(
                grad_y, product, h, lora_B, NormScale(norm, scale), call.scaling, ends,
                saved_is="base" if ctx.is_base else "output",
                magnitude_dtype=ctx.dtypes[3] if needs_m else None, B_dtype=ctx.dtypes[2] if needs_B else None,
                needs_base=(needs_x and not in_weight_space) or (needs_A and through_base), rounding=call.rounding,
            )  # fmt: skip
            grad_x = grad_A = None
            if needs_A or (needs_x and not in_weight_space):
                B = ops.scaled_cast(
                    lora_B.reshape(E * N, R), grad_y.dtype,
                    scale=None if through_base else scale.view(E * N), scaling=call.scaling, rounding=call.rounding,
                ).view(E, N, R)  # fmt: skip
                grad_h = grouped_mm(grad_base if through_base else grad_y, B, ends)
            if needs_A:
                grad_A = ops.expert_wgrad(grad_h, x, ends, dtype=ctx.dtypes[1])
            if needs_x and in_weight_space:
                factors = A, lora_B, NormScale(norm, scale), call.scaling, call.rounding
                grad_x = merged_mm(ops, grad_y, weight, *factors, ends, transposed=False)
            elif needs_x:
                # The small product's rounding is small beside the sum's.
                grad_x = stack_mm(ops, grad_base, weight, ends, transposed=False).add_(grouped_mm(grad_h, A, ends))
        return grad_x, grad_A, grad_B, grad_m, None, None, None, None, None


def _with_bias(output, bias, ends, *, in_place):
    y = output if in_place else output.clone()
    for expert, rows in expert_rows(ends):
        y[rows] += bias[expert].to(y.dtype)
    return y


def _cast(ops, call, lora_A, dtype):
    """A in the dtype of the tokens."""
    if lora_A.dtype == dtype:
        return lora_A
    return ops.scaled_cast(lora_A.flatten(0, 1), dtype, rounding=call.rounding).view(lora_A.shape)


def dora_experts(
    x: torch.Tensor,
    weight: Stack,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    ends: torch.Tensor,
    *,
    scaling: float,
    bias: torch.Tensor | None = None,
    space: str = "auto",
    impl: str = "auto",
    rounding: str = "dithered",
    training: bool = False,
    salt: int = 0,
    frozen_scale: tuple[torch.Tensor, torch.Tensor] | None = None,
    output_use: OutputUse | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """g_e ⊙ (x W_eᵀ + s x A_eᵀ B_eᵀ) + b_e of each token's expert e (DoRA, arXiv 2402.09353, per expert).

    Differentiable in `x`, `lora_A`, `lora_B` and `magnitude`, once. An expert without tokens gets zero gradients.

    Args:
        x: [S, in_features], sorted by expert, in the dtype of `weight`: fp16, bf16, fp32 or fp64.
        weight: [E, out_features, in_features], of any strides, frozen; or an `Fp8Stack`.
        lora_A: [E, r, in_features]; lora_B: [E, out_features, r]; magnitude: [E, out_features]; fp32 or x's dtype.
        ends: [E] int32; the rows of expert e are ends[e − 1] … ends[e], and ends[E − 1] is S.
        bias: [E, out_features], frozen, added after the magnitude.
        activation: "silu" or "gelu_tanh": the features are gate's before up's, and act(gate) ⊙ up is returned.
        space: "token", "weight", or "auto", which takes what `plan_experts` predicts to be faster.
        scaling, impl, rounding, training, salt, frozen_scale, output_use: as in `dora_linear`.

    Returns:
        [S, out_features] in x's dtype, or half as many features with an `activation`.

    Raises:
        ValueError: shapes, devices or options that do not fit. TypeError: dtypes that do not fit.
    """
    _check(x, weight, lora_A, lora_B, magnitude, ends, bias, rounding)
    if activation is not None and (activation not in ACTIVATIONS or weight.shape[1] % 2):
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, of an even number of features, got {activation!r} of "
            f"{weight.shape[1]}"
        )
    trainable = any(tensor.requires_grad for tensor in (x, lora_A, lora_B, magnitude))
    # In training mode a checkpointed forward without gradients must round as its recomputation does.
    trains = trainable and (training or torch.is_grad_enabled())
    if frozen_scale is not None and trains:
        raise ValueError("frozen_scale is for inference: run under torch.no_grad(), or leave it out to train")
    if not isinstance(weight, torch.Tensor) and _cannot_wait(x):
        raise ValueError("a stack in FP8 is decoded expert by expert: torch.compile and CUDA graphs cannot record it")
    gated = activation is not None and bias is None
    plan = plan_experts(
        weight, lora_A, magnitude, bias, tokens=len(x), dtype=x.dtype, trains=trains, impl=impl, gated=gated,
        space="token" if space == "auto" and _cannot_wait(x) else space,
    )  # fmt: skip
    given = None if frozen_scale is None else NormScale(*frozen_scale)
    if trains:
        given = remembered_norm(output_use, (lora_A, lora_B, magnitude), float(scaling))
    in_one_pass, rounded = gated and plan.space == "token", Rounding(rounding, int(salt))
    one_pass = activation if in_one_pass else None
    call = Call(plan.space, plan.impl, float(scaling), rounded, trains, output_use, one_pass)
    y = DoraExpertsFunction.apply(x, lora_A, lora_B, magnitude, weight, bias, ends, given, call)
    if activation is None or in_one_pass:
        return y
    gate, up = y.chunk(2, dim=1)
    return ACTIVATIONS[activation](gate) * up


def plan_experts(
    weight: Stack,
    lora_A: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    tokens: int,
    dtype: torch.dtype,
    trains: bool,
    space: str,
    impl: str,
    gated: bool = False,
) -> dispatch.Plan:
    """What a stack runs on `tokens` rows, and why.

    Its experts are taken to have equally many. How many each has is known on the GPU alone.
    """
    experts, out_features, in_features = weight.shape
    problem = Problem(
        tokens, out_features, in_features, lora_A.shape[1], dtype, weight.device,
        adapter_dtype=lora_A.dtype, has_bias=bias is not None, trains=trains,
        trains_magnitude=trains and magnitude.requires_grad, is_packed=not isinstance(weight, torch.Tensor),
    )  # fmt: skip
    plan, note = dispatch.choose(problem, space, impl, experts_overhead(experts, gated)), note_of(weight)
    return plan if note is None else plan._replace(reason=f"{plan.reason}; {note}")


def _cannot_wait(x: torch.Tensor) -> bool:
    """Whether weight space, which waits for the GPU, would break what is being recorded: a graph."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _check(x, weight, lora_A, lora_B, magnitude, ends, bias, rounding) -> None:
    """Raises a ValueError or TypeError that names the argument, what was expected and what came."""
    stored = weight.codes if isinstance(weight, Fp8Stack) else weight
    tensors = {"weight": stored, "lora_A": lora_A, "lora_B": lora_B, "magnitude": magnitude, "bias": bias, "x": x}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in tensors.items():
        if sharding := sharding_of(tensor):
            raise TypeError(f"{name} is {sharding}")
    if len(weight.shape) != 3:
        raise ValueError(f"weight must be [experts, out_features, in_features], got shape {list(weight.shape)}")
    E, N, K = weight.shape
    R = lora_A.shape[1] if lora_A.ndim == 3 else 0
    shapes = {
        "x": (x, [x.shape[0] if x.ndim else 0, K]),
        "lora_A": (lora_A, [E, max(R, 1), K]),
        "lora_B": (lora_B, [E, N, R]),
        "magnitude": (magnitude, [E, N]),
        "ends": (ends, [E]),
        "bias": (bias, [E, N]),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {list(tensor.shape)}")
    if ends.dtype != torch.int32:
        raise TypeError(f"ends must be int32, got {ends.dtype}")
    if x.dtype != weight.dtype:
        raise TypeError(f"x and weight must have one dtype, got x {x.dtype} and weight {weight.dtype}")
    for name, tensor in tensors.items():
        is_decoded = tensor is stored and stored is not weight
        if not (is_decoded or (tensor.dtype.is_floating_point and tensor.element_size() >= 2)):
            raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move one of them")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight must be frozen: call weight.requires_grad_(False), DoRA trains A, B and the magnitude")
    if rounding not in ("dithered", "nearest"):
        raise ValueError(f'rounding must be "dithered" or "nearest", got {rounding!r}')
