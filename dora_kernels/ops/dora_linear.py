"""`dora_linear`: checks, dispatch, then `DoraLinearFunction`: forward, backward, and what is kept between them."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import dispatch
from .base_weights import Nf4Weight, Weight, of_params4bit, readable
from .checks import check_arguments
from .chunked import mm_fp32
from .types import NormScale, Rounding


class Call(NamedTuple):
    """The constants of one call: what `dispatch` chose and the caller asked for."""

    space: str
    impl: str
    scaling: float
    rounding: Rounding
    dropout: str | None
    trains: bool


class DoraLinearFunction(torch.autograd.Function):
    """y = g ⊙ (x Wᵀ + s h Bᵀ) + b with h = x Aᵀ and the detached norm n in g = m / n. Notation: `reference`.

    Forward, token space:   z = x Wᵀ [M,K]·[K,N];  h [M,K]·[K,R];  y = rescale(z, h)
             weight space:  W' = merge(W) [N,K];   h;              y = x W'ᵀ [M,K]·[K,N]
    Backward, both:         dh = dy (s g ⊙ B) [M,N]·[N,R];  dB = s g ⊙ (dyᵀ h) [N,M]·[M,R];  dA = dhᵀ x [R,M]·[M,K]
             token space:   dx = dh A [M,R]·[R,K] + (dy ⊙ g) W [M,N]·[N,K]
             weight space:  dx = dy W' [M,N]·[N,K], merged again with the saved g
    dm comes from y, which the consumer usually keeps anyway. A bias, fp16 or PEFT's dropout would spoil y for that:
    then the product before the bias (z in token space; in fp32 with the bias, which is taken off again) is kept
    instead. Never both.

    Under dropout `x_dropped` feeds A alone (mode "lora"), or A and the (g − 1) term (mode "peft": a second base GEMM,
    y = x Wᵀ + b + (g − 1) ⊙ x_dropped Wᵀ + g ⊙ s h Bᵀ).
    """

    @staticmethod
    def forward(ctx, x, x_dropped, lora_A, lora_B, magnitude, bias, weight, frozen_scale, call):
        ops = dispatch.implementation(call.impl)
        needs_A, needs_B, needs_magnitude = (call.trains and n for n in ctx.needs_input_grad[2:5])
        with dispatch.on_device_of(x), torch.autocast(x.device.type, enabled=False):
            lora_x, base_bias = x if x_dropped is None else x_dropped, None
            frozen_weight, weight = weight, readable(weight)
            needs_h = call.space == "token" or needs_B
            A_dtype = x.dtype if needs_h and lora_A.dtype != x.dtype else None
            if call.space == "token":
                if frozen_scale is None:
                    norm_scale, A_cast = ops.weight_norm(
                        weight, lora_A, lora_B, magnitude, call.scaling, A_dtype=A_dtype, rounding=call.rounding
                    )
                else:
                    norm_scale = NormScale(*frozen_scale)
                    A_cast = None if A_dtype is None else ops.scaled_cast(lora_A, A_dtype, rounding=call.rounding)
                A_cast = lora_A if A_cast is None else A_cast
                h = lora_x @ A_cast.T
                base_weight = _dense(ops, weight, x.dtype)
                # A GEMM may start its sums from the bias: only with the base layer's own product a fresh adapter equals
                # that layer to the last bit. In 16 bits what dm needs would not survive taking the bias off again.
                gemm_bias = bias.to(x.dtype) if bias is not None and x.element_size() >= 4 else None
                base_out, undropped = F.linear(x, base_weight, gemm_bias), None
                if call.dropout == "peft":
                    undropped, base_out = base_out, x_dropped @ base_weight.T
                base_bias = gemm_bias if undropped is None else None
                # From y, dm would cancel against a large bias and underflow in fp16; PEFT's dropout is not of its form.
                keeps_base = needs_magnitude and (bias is not None or undropped is not None or x.dtype == torch.float16)
                y = ops.rescale_fwd(
                    base_out, h, lora_B, norm_scale.scale, bias if gemm_bias is None else None, call.scaling,
                    base_bias=base_bias, undropped=undropped, in_place=not keeps_base,
                    rounding=call.rounding,
                )  # fmt: skip
                saved, ctx.saved_is = (base_out, "base") if keeps_base else (y, "output")
            else:
                merged, norm_scale, A_cast = ops.merge(
                    weight,
                    lora_A,
                    lora_B,
                    magnitude,
                    call.scaling,
                    dtype=x.dtype,
                    rounding=call.rounding,
                    norm_scale=None if frozen_scale is None else NormScale(*frozen_scale),
                    A_dtype=A_dtype,
                )
                h = lora_x @ (lora_A if A_cast is None else A_cast).T if needs_h else None
                if needs_magnitude and bias is not None:
                    saved = x @ merged.T
                    y = saved + bias.to(x.dtype)
                else:
                    saved = y = F.linear(x, merged, None if bias is None else bias.to(x.dtype))
                ctx.saved_is = "output"
        ctx.call, ctx.adapter_dtypes = call, (lora_A.dtype, lora_B.dtype, magnitude.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        # A quantised weight is no tensor: its library's memory, which nothing here writes.
        ctx.quantized = None if isinstance(frozen_weight, torch.Tensor) else frozen_weight
        ctx.save_for_backward(
            lora_x if needs_A else None,
            h if needs_B or needs_magnitude else None,
            saved if needs_magnitude else None,
            frozen_weight if ctx.quantized is None else None,
            A_cast if call.space == "token" else lora_A,
            lora_B,
            *norm_scale,
            base_bias if needs_magnitude else None,
        )
        return y

    @staticmethod
    def backward(ctx, grad_y):
        # torch's once_differentiable lets a constant grad_y pass, and a gradient penalty would be dropped in silence.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("dora_linear cannot differentiate twice: call backward without create_graph=True")
        call = ctx.call
        ops = dispatch.implementation(call.impl)
        lora_x, h, saved, weight, lora_A, lora_B, norm, scale, base_bias = _saved_tensors(ctx)
        norm_scale = NormScale(norm, scale)
        weight = weight if ctx.quantized is None else ctx.quantized
        needs_x, needs_dropped, needs_A, needs_B, needs_magnitude, needs_bias = ctx.needs_input_grad[:6]
        dtype_A, dtype_B, dtype_m = ctx.adapter_dtypes
        token, peft_dropout = call.space == "token", call.dropout == "peft"
        # s g ⊙ B is small and rounded once; in fp16 it may underflow while B is young, so there g comes in through dZ.
        through_base = token and not peft_dropout and grad_y.dtype == torch.float16
        grad_x = grad_dropped = grad_A = None
        with dispatch.on_device_of(grad_y), torch.autocast(grad_y.device.type, enabled=False):
            grad_magnitude, grad_B, grad_bias, grad_base = ops.rescale_bwd(
                grad_y, saved, h, lora_B, norm_scale, call.scaling,
                saved_is=ctx.saved_is,
                base_bias=base_bias,
                magnitude_dtype=dtype_m if needs_magnitude else None,
                B_dtype=dtype_B if needs_B else None,
                bias_dtype=ctx.bias_dtype if needs_bias else None,
                needs_base=token and (needs_dropped if peft_dropout else needs_x or through_base),
                scale_shift=1.0 if peft_dropout else 0.0,
                rounding=call.rounding,
            )  # fmt: skip
            if needs_A or (token and (needs_x or needs_dropped)):
                factor = ops.scaled_cast(
                    lora_B,
                    grad_y.dtype,
                    scale=None if through_base else scale,
                    scaling=call.scaling,
                    rounding=call.rounding,
                )
                grad_h = (grad_base if through_base else grad_y) @ factor
            if needs_A:
                grad_A = grad_h.T @ lora_x if dtype_A == lora_x.dtype else mm_fp32(grad_h.T, lora_x).to(dtype_A)
            if not token:
                grad_x = _grad_x_weight(ops, call, grad_y, weight, lora_A, lora_B, norm_scale) if needs_x else None
            elif call.dropout is None:
                grad_x = _sum_of_products(ops, grad_h, lora_A, grad_base, weight) if needs_x else None
            else:
                base_weight = _dense(ops, weight, grad_y.dtype)
                if needs_x:
                    grad_x = (grad_y if peft_dropout else grad_base) @ base_weight
                if needs_dropped:
                    grad_dropped = (
                        _sum_of_products(ops, grad_h, lora_A, grad_base, weight) if peft_dropout else grad_h @ lora_A
                    )
        return (
            grad_x,
            grad_dropped,
            grad_A,
            grad_B,
            grad_magnitude,
            grad_bias,
            None,
            None,
            None,
        )


def _saved_tensors(ctx):
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "output 0 of DoraLinearFunction" not in str(error):
            raise
        raise RuntimeError(
            f"{error} This is a DoRA layer's output, from which its magnitude's gradient is read. If the model must "
            "write over it, let it write over a copy: layer.register_forward_hook(lambda layer, args, y: y.clone())"
        ) from error


def _sum_of_products(ops, grad_h, lora_A, grad_base, weight):
    """dh A + dZ W; the small product first, whose rounding is small beside the sum's."""
    return (grad_h @ lora_A).addmm_(grad_base, _dense(ops, weight, grad_base.dtype))


def _grad_x_weight(ops, call, grad_y, weight, lora_A, lora_B, norm_scale):
    """dy W', with W' merged again: nothing of its size was kept."""
    merged, _, _ = ops.merge(
        readable(weight), lora_A, lora_B, None, call.scaling, dtype=grad_y.dtype,
        norm_scale=norm_scale, rounding=call.rounding,
    )  # fmt: skip
    return grad_y @ merged


def _dense(ops, weight, dtype):
    """The weight as a matrix in `dtype`: itself where it is one already."""
    return ops.decode(weight, dtype) if isinstance(weight, Nf4Weight) else readable(weight).to(dtype)


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
) -> torch.Tensor:
    """g ⊙ (x Wᵀ + s x Aᵀ Bᵀ) + b with g = m / ‖W + s B A‖, the norm detached (DoRA, arXiv 2402.09353 §4.3).

    Differentiable in `x`, `lora_A`, `lora_B`, `magnitude` and `bias`, once.

    Args:
        x: [..., in_features], fp16, bf16, fp32 or fp64; cast to autocast's dtype where autocast is on.
        weight: [out_features, in_features] in x's dtype (any, under autocast), frozen; or bitsandbytes' `Params4bit`,
            or what `quantized.weight_of` makes of a quantised layer: these are multiplied in x's dtype.
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

    Returns:
        [..., out_features] in x's dtype (under autocast: autocast's).

    Raises:
        ValueError: shapes, devices or options that do not fit. TypeError: dtypes that do not fit.
    """
    if type(weight).__name__ == "Params4bit":
        weight = of_params4bit(weight, weight.quant_state, nf4_parity=nf4_parity)
    check_arguments(x, weight, lora_A, lora_B, magnitude, bias, rounding, lora_dropout, dropout_mode)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    elif isinstance(weight, torch.Tensor) and dtype != weight.dtype:
        raise TypeError(
            f"x and weight must have one dtype outside autocast, got x {dtype} and weight {weight.dtype}; "
            f"cast x with x.to({weight.dtype}) or run under torch.autocast"
        )
    trainable = [t for t in (x, lora_A, lora_B, magnitude, bias) if t is not None and t.requires_grad]
    # Reentrant checkpointing runs the first forward without gradients: in training mode it must take the same form, and
    # round the same way, as its recomputation.
    trains = bool(trainable) and (training or torch.is_grad_enabled())
    if frozen_scale is not None and trains:
        raise ValueError("frozen_scale is for inference: run under torch.no_grad(), or leave it out to train")
    dropout = dropout_mode if training and lora_dropout > 0 else None
    tokens = math.prod(x.shape[:-1])
    plan = dispatch.choose(
        tokens=tokens,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        dtype=dtype,
        device=x.device,
        rank=lora_A.shape[0],
        adapter_dtype=lora_A.dtype,
        has_bias=bias is not None,
        dropout=dropout,
        trains=trains,
        trains_magnitude=trains and magnitude.requires_grad,
        nf4=isinstance(weight, Nf4Weight),
        space=space,
        impl=impl,
    )
    # PEFT casts to the adapter's dtype before it drops, which leaves the mask the same.
    x_dropped = None if dropout is None else F.dropout(x, lora_dropout).to(dtype).reshape(tokens, x.shape[-1])
    x_flat = x.to(dtype).reshape(tokens, x.shape[-1])
    call = Call(plan.space, plan.impl, float(scaling), Rounding(rounding, int(salt)), dropout, trains)
    y = DoraLinearFunction.apply(x_flat, x_dropped, lora_A, lora_B, magnitude, bias, weight, frozen_scale, call)
    return y.view(*x.shape[:-1], weight.shape[0])
