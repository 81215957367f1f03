"""`dora_linear`: DoRA (Liu et al., 2024, arXiv 2402.09353) as one operation, and its gradient.

    forward    y = g ⊙ (z + s h Bᵀ) + b = x W'ᵀ + b      z = x Wᵀ      h = x Aᵀ      g = m / n      W' = g ⊙ (W + s B A)
    backward   db = Σ dy      dm = Σ dy ⊙ (z + s h Bᵀ) / n      dh = dy (s g ⊙ B)      dB = s g ⊙ (dyᵀ h)
               dA = dhᵀ x     dx = dh A + dZ W = dy W'          dZ = dy ⊙ g

Token space computes z and dZ, weight space W'. Σ runs over the tokens, ⊙ over output features. Every file uses these
symbols:

    M, N, K, R    tokens, out_features, in_features, rank
    x, y          input [M, K], output [M, N]
    W, b          `weight` [N, K], frozen; `bias` [N]
    A, B, m       `lora_A` [R, K], `lora_B` [N, R], `magnitude` [N], trained
    s             `scaling`, lora_alpha / r
    n             `norm`, `weight_norm` [N]: ‖W + s B A‖₂ per output feature, detached (the paper's §4.3)
    g             `scale`, `mag_norm_scale` [N]: m / n
    z, h          `base_out` [M, N], `h` [M, R]
    V, W'         W + s B A; `merged` [N, K]: g ⊙ V
    dT, dZ        the gradient of the loss by T, `grad_T`; `grad_base` [M, N]: that by z

Sums and products are fp32, or fp64 where an input is.
"""

import math

import torch
import torch.nn.functional as F

from ..config import check_bools
from . import dispatch
from .accumulation import kept_norm
from .base_weights import Weight, of_params4bit
from .call import NO_GRADIENTS, Call, Gradients, Inputs, Saved
from .checks import check_arguments, dtype_of_call, refuse_tracing
from .forms import token_backward, token_forward, weight_backward, weight_forward
from .output import OutputUse, note_written, shared_with_the_model
from .problem import problem_of
from .recomputation import remembered_norm
from .served import why_not_served
from .types import NormScale, Rounding


class DoraLinearFunction(torch.autograd.Function):
    """y [M, N] and the six gradients, in the form that `call` names.

    dm is read off y where that is exact, as y's consumer usually keeps y anyway; else the product before the bias is
    kept, never both. Where the model wrote over y meanwhile, dm is read off a product that the backward computes again
    from x. Under dropout `x_dropped` [M, K] feeds A alone (mode "lora"), or A and the (g − 1) term ("peft").
    """

    @staticmethod
    def forward(ctx, x, x_dropped, lora_A, lora_B, magnitude, bias, weight, given, call):
        inputs = Inputs(x, x_dropped, lora_A, lora_B, magnitude, bias, weight, given)
        needs = Gradients(*ctx.needs_input_grad[:6]) if call.trains else NO_GRADIENTS
        form = token_forward if call.space == "token" else weight_forward
        with dispatch.on_device_of(x), dispatch.without_autocast(x.device):
            y, saved = form(dispatch.implementation(call.impl), call, inputs, needs)
        ctx.call = call
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:6]]
        # A quantised weight is no tensor: its library's memory, which nothing here writes.
        ctx.quantized = None if isinstance(weight, torch.Tensor) else weight
        saved = saved.for_backward(needs)._replace(weight=weight if ctx.quantized is None else None)
        ctx.writes = None
        if saved.output is y:
            y, kept, ctx.writes = shared_with_the_model(y, call.output_use)
            saved = saved._replace(output=kept)
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        # torch's once_differentiable lets a constant grad_y pass, and a gradient penalty would be dropped in silence.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("dora_linear cannot differentiate twice: call backward without create_graph=True")
        call, saved = ctx.call, Saved(*ctx.saved_tensors)
        if ctx.writes is not None and ctx.writes.has_moved:
            saved = saved._replace(output=None)
            note_written(call.output_use, can_repeat=saved.lora_x is not None and call.dropout is None)
        if ctx.quantized is not None:
            saved = saved._replace(weight=ctx.quantized)
        asked = Gradients(*(dtype if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad)))
        form = token_backward if call.space == "token" else weight_backward
        with dispatch.on_device_of(grad_y), dispatch.without_autocast(grad_y.device):
            gradients = form(dispatch.implementation(call.impl), call, grad_y, saved, asked)
        return (*gradients, None, None, None)


def dora_linear(
    x: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    *,
    scaling: float,
    bias: torch.Tensor | None = None,
    space: str = "auto",
    impl: str = "auto",
    rounding: str = "dithered",
    lora_dropout: float = 0.0,
    dropout_mode: str = "lora",
    training: bool = False,
    nf4_parity: bool = False,
    salt: int = 0,
    frozen_scale: tuple[torch.Tensor, torch.Tensor] | None = None,
    output_use: OutputUse | None = None,
    merge_aware: bool = False,
) -> torch.Tensor:
    """g ⊙ (x Wᵀ + s x Aᵀ Bᵀ) + b with g = m / ‖W + s B A‖, the norm detached (DoRA, arXiv 2402.09353 §4.3).

    Differentiable in `x`, `lora_A`, `lora_B`, `magnitude` and `bias`, once.

    Args:
        x: [..., in_features], fp16, bf16, fp32 or fp64; cast to autocast's dtype where autocast is on.
        weight: [out_features, in_features] in x's dtype (any, under autocast), frozen; or bitsandbytes' `Params4bit`,
            or what `base_weights.weight_of` reads of a quantised layer: these are multiplied in x's dtype.
        lora_A: [r, in_features]; lora_B: [out_features, r]; magnitude: [out_features]; fp32 or x's dtype.
        scaling: s, `lora_alpha / r`.
        bias: [out_features], added after the magnitude, as PEFT does.
        space: "token" (x Wᵀ, then one epilogue), "weight" (W' first, then one GEMM) or "auto".
        impl: "triton", "reference" or "auto".
        rounding: how values are rounded to bf16 or fp16: "dithered" (unbiased, reproducible) or "nearest".
        lora_dropout: probability, applied while `training`.
        training: drop, and take the form and the roundings of training even where gradients are off.
        dropout_mode: "lora" drops the LoRA branch's input alone; "peft" also that of the (g − 1) term.
        nf4_parity: of a `Params4bit` in NF4, round what is decoded to the dtype it was quantised from, as PEFT does;
            by default it stays fp32 until W' is rounded once, to nearest, which is unbiased there.
        salt: any 32-bit number; layers with different salts dither differently.
        frozen_scale: (n, g) of these very parameters, for inference only.
        output_use: shared by the calls of one layer. A backward that finds the output written over in place, which
            costs it one more GEMM, lets later calls return a copy.
        merge_aware: multiply with W' as it will be served: quantised in the weight's own format, or rounded to its
            dtype, to nearest, with a straight-through gradient. In weight space; PyTorch finds the codes.

    Returns:
        [..., out_features] in x's dtype (under autocast: autocast's).

    Raises:
        ValueError: shapes, devices or options that do not fit. TypeError: dtypes that do not fit. RuntimeError: inside
            `torch.jit.trace`, which cannot record it.
    """
    refuse_tracing()
    check_bools(training=training, nf4_parity=nf4_parity, merge_aware=merge_aware)
    if type(weight).__name__ == "Params4bit":
        weight = of_params4bit(weight, weight.quant_state, nf4_parity=nf4_parity)
    check_arguments(x, weight, lora_A, lora_B, magnitude, bias, rounding, lora_dropout, dropout_mode)
    if merge_aware and (reason := why_not_served(weight)):
        raise ValueError(f"merge_aware quantises the merged weight in its base's format, and this weight {reason}")
    dtype = dtype_of_call(x, weight)
    trainable = any(t is not None and t.requires_grad for t in (x, lora_A, lora_B, magnitude, bias))
    # Reentrant checkpointing runs the first forward without gradients: in training mode it must take the same form, and
    # round the same way, as its recomputation.
    trains = trainable and (training or torch.is_grad_enabled())
    if frozen_scale is not None and trains:
        raise ValueError("frozen_scale is for inference: run under torch.no_grad(), or leave it out to train")
    dropout = dropout_mode if training and lora_dropout > 0 else None
    tokens = math.prod(x.shape[:-1])
    problem = problem_of(
        weight, lora_A, magnitude, bias, tokens=tokens, dtype=dtype, dropout=dropout, trains=trains,
        merge_aware=merge_aware,
    )  # fmt: skip
    plan = dispatch.choose(problem, space, impl)
    # PEFT casts before it drops: the mask is the same either way.
    x_dropped = None if dropout is None else F.dropout(x, lora_dropout).to(dtype).reshape(tokens, x.shape[-1])
    x_flat = x.to(dtype).reshape(tokens, x.shape[-1])
    given = None if frozen_scale is None else NormScale(*frozen_scale)
    if trains and not merge_aware:
        given = known_norm(plan.impl, output_use, weight, (lora_A, lora_B, magnitude), float(scaling))
    rounded = Rounding(rounding, int(salt))
    call = Call(plan.space, plan.impl, float(scaling), rounded, dropout, trains, output_use, merge_aware)
    y = DoraLinearFunction.apply(x_flat, x_dropped, lora_A, lora_B, magnitude, bias, weight, given, call)
    return y.view(*x.shape[:-1], weight.shape[0])


def known_norm(
    impl: str, use: OutputUse | None, weight: Weight, factors: tuple[torch.Tensor, ...], scaling: float
) -> NormScale | None:
    """n and g that an earlier call left: the forward that is being recomputed, or one of `accumulating`."""
    known = remembered_norm(use, factors, scaling)
    if known is not None or use is None or not use.keeps_norm:
        return known
    with dispatch.on_device_of(factors[0]), dispatch.without_autocast(factors[0].device):
        return kept_norm(dispatch.implementation(impl), use, weight, factors, scaling)
