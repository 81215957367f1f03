"""`dora_linear`: checks, then `DoraLinearFunction`."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import dispatch
from .gemm import mm_fp32


class Call(NamedTuple):
    """The constants of one call: what `dispatch` chose and the caller asked for."""

    space: str
    impl: str
    scaling: float
    rounding: str
    salt: int
    dropout: str | None
    trains: bool


class DoraLinearFunction(torch.autograd.Function):
    """y = g ⊙ (x Wᵀ + s h Bᵀ) + b with h = x Aᵀ and the detached norm n in g = m / n. Notation: `reference`.

    Forward, token space:   z = x Wᵀ [M,K]·[K,N];  h [M,K]·[K,R];  y = rescale(z, h)
             weight space:  W' = merge(W) [N,K];   h;              y = x W'ᵀ [M,K]·[K,N]
    Backward, both:         dh = dy (s g ⊙ B) [M,N]·[N,R];  dB = s g ⊙ (dyᵀ h) [N,M]·[M,R];  dA = dhᵀ x [R,M]·[M,K]
             token space:   dx = (dy ⊙ g) W [M,N]·[N,K] + dh A [M,R]·[R,K]
             weight space:  dx = dy W' [M,N]·[N,K], merged again with the saved g
    dm comes from y, which the consumer usually keeps anyway. A bias, fp16 or PEFT's dropout would spoil y for that:
    then the product before the bias (z in token space) is kept instead. Never both.

    Under dropout `x_dropped` feeds A alone (mode "lora"), or A and the (g − 1) term (mode "peft": a second base GEMM,
    y = x Wᵀ + b + (g − 1) ⊙ x_dropped Wᵀ + g ⊙ s h Bᵀ).
    """

    @staticmethod
    def forward(ctx, x, x_dropped, lora_A, lora_B, magnitude, bias, weight, frozen_scale, call):
        ops = dispatch.implementation(call.impl)
        rounded = {"rounding": call.rounding, "salt": call.salt}
        needs_A, needs_B, needs_magnitude = (call.trains and n for n in ctx.needs_input_grad[2:5])
        with torch.autocast(x.device.type, enabled=False):
            lora_x = x if x_dropped is None else x_dropped
            A_cast = _cast(ops, lora_A, x.dtype, rounded)
            h = lora_x @ A_cast.T if call.space == "token" or needs_B else None
            if call.space == "token":
                norm, scale = frozen_scale or ops.weight_norm(weight, lora_A, lora_B, magnitude, call.scaling)
                base_weight = weight.to(x.dtype)
                base_out = x @ base_weight.T
                undropped = None
                if call.dropout == "peft":
                    undropped, base_out = base_out, x_dropped @ base_weight.T
                # From y, dm would cancel against a large bias and underflow in fp16; PEFT's dropout is not of its form.
                keeps_base = needs_magnitude and (bias is not None or undropped is not None or x.dtype == torch.float16)
                y = ops.rescale_fwd(
                    base_out, h, lora_B, scale, bias, call.scaling,
                    undropped=undropped, in_place=not keeps_base, **rounded,
                )  # fmt: skip
                saved, ctx.saved_is = (base_out, "base") if keeps_base else (y, "output")
            else:
                merged, norm, scale = ops.merge(
                    weight, lora_A, lora_B, magnitude, call.scaling, dtype=x.dtype, **_given(frozen_scale), **rounded
                )
                if needs_magnitude and bias is not None:
                    saved = x @ merged.T
                    y = saved + bias.to(x.dtype)
                else:
                    saved = y = F.linear(x, merged, None if bias is None else bias.to(x.dtype))
                ctx.saved_is = "output"
        ctx.call, ctx.adapter_dtypes = call, (lora_A.dtype, lora_B.dtype, magnitude.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            lora_x if needs_A else None,
            h if needs_B or needs_magnitude else None,
            saved if needs_magnitude else None,
            weight,
            A_cast if call.space == "token" else lora_A,
            lora_B,
            norm,
            scale,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        call = ctx.call
        ops = dispatch.implementation(call.impl)
        rounded = {"rounding": call.rounding, "salt": call.salt}
        lora_x, h, saved, weight, lora_A, lora_B, norm, scale = ctx.saved_tensors
        needs_x, needs_dropped, needs_A, needs_B, needs_magnitude, needs_bias = ctx.needs_input_grad[:6]
        token, peft_dropout = call.space == "token", call.dropout == "peft"
        grad_x = grad_dropped = grad_A = None
        with torch.autocast(grad_y.device.type, enabled=False):
            grad_magnitude, grad_B, grad_bias, grad_base = ops.rescale_bwd(
                grad_y, saved, h, lora_B, norm, scale, call.scaling,
                saved_is=ctx.saved_is,
                needs_magnitude=needs_magnitude, needs_B=needs_B, needs_bias=needs_bias,
                needs_base=token and (needs_dropped if peft_dropout else needs_x),
                scale_shift=1.0 if peft_dropout else 0.0,
                **rounded,
            )  # fmt: skip
            if needs_A or (token and (needs_x or needs_dropped)):
                factor = ops.scaled_cast(lora_B, grad_y.dtype, scale=scale, scaling=call.scaling, **rounded)
                grad_h = grad_y @ factor
            if needs_A:
                grad_A = mm_fp32(grad_h.T, lora_x)
            if not token:
                if needs_x:
                    merged, _, _ = ops.merge(
                        weight, lora_A, lora_B, None, call.scaling, dtype=grad_y.dtype,
                        weight_norm=norm, mag_norm_scale=scale, **rounded,
                    )  # fmt: skip
                    grad_x = grad_y @ merged
            else:
                base_weight = weight.to(grad_y.dtype)
                if needs_x:
                    grad_x = (grad_y if peft_dropout else grad_base) @ base_weight
                if needs_dropped:
                    grad_dropped = grad_h @ lora_A
                    if peft_dropout:
                        grad_dropped.addmm_(grad_base, base_weight)
                elif needs_x:
                    grad_x.addmm_(grad_h, lora_A)
        dtype_A, dtype_B, dtype_m = ctx.adapter_dtypes
        return (
            grad_x,
            grad_dropped,
            _to(grad_A, dtype_A),
            _to(grad_B, dtype_B),
            _to(grad_magnitude, dtype_m),
            _to(grad_bias, ctx.bias_dtype),
            None,
            None,
            None,
        )


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
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
    salt: int = 0,
    frozen_scale: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """g ⊙ (x Wᵀ + s x Aᵀ Bᵀ) + b with g = m / ‖W + s B A‖, the norm detached (DoRA, arXiv 2402.09353 §4.3).

    Differentiable in `x`, `lora_A`, `lora_B`, `magnitude` and `bias`, once.

    Args:
        x: [..., in_features], fp16, bf16, fp32 or fp64; cast to autocast's dtype where autocast is on.
        weight: [out_features, in_features] in x's dtype (any, under autocast), frozen.
        lora_A: [r, in_features]; lora_B: [out_features, r]; magnitude: [out_features]; fp32 or x's dtype.
        scaling: s, `lora_alpha / r`.
        bias: [out_features], added after the magnitude, as PEFT does.
        space: "token" (x Wᵀ, then one epilogue), "weight" (W' first, then one GEMM) or "auto".
        impl: "triton", "reference" or "auto".
        rounding: how values are rounded to bf16 or fp16: "dithered" (unbiased, reproducible) or "nearest".
        lora_dropout: probability, applied while `training`.
        dropout_mode: "lora" drops the LoRA branch's input alone; "peft" also that of the (g − 1) term.
        salt: any 32-bit number; layers with different salts dither differently.
        frozen_scale: (n, g) of these very parameters, for inference only.

    Returns:
        [..., out_features] in x's dtype (under autocast: autocast's).

    Raises:
        ValueError: shapes, devices or options that do not fit. TypeError: dtypes that do not fit.
    """
    check_arguments(x, weight, lora_A, lora_B, magnitude, bias, rounding, lora_dropout, dropout_mode)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    elif dtype != weight.dtype:
        raise TypeError(
            f"x and weight must have one dtype outside autocast, got x {dtype} and weight {weight.dtype}; "
            f"cast x with x.to({weight.dtype}) or run under torch.autocast"
        )
    trainable = [t for t in (x, lora_A, lora_B, magnitude, bias) if t is not None and t.requires_grad]
    trains = torch.is_grad_enabled() and bool(trainable)
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
        has_bias=bias is not None,
        dropout=dropout,
        trains=trains,
        trains_magnitude=trains and magnitude.requires_grad,
        space=space,
        impl=impl,
    )
    # PEFT casts to the adapter's dtype before it drops, which leaves the mask the same.
    x_dropped = None if dropout is None else F.dropout(x, lora_dropout).to(dtype).reshape(tokens, x.shape[-1])
    x_flat = x.to(dtype).reshape(tokens, x.shape[-1])
    call = Call(plan.space, plan.impl, float(scaling), rounding, int(salt), dropout, trains)
    y = DoraLinearFunction.apply(x_flat, x_dropped, lora_A, lora_B, magnitude, bias, weight, frozen_scale, call)
    return y.view(*x.shape[:-1], weight.shape[0])


def check_arguments(x, weight, lora_A, lora_B, magnitude, bias, rounding, lora_dropout, dropout_mode) -> None:
    """Raises a ValueError or TypeError that names the argument, what was expected and what came."""
    if weight.ndim != 2:
        raise ValueError(f"weight must be [out_features, in_features], got shape {list(weight.shape)}")
    out_features, in_features = weight.shape
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x must be [..., in_features] = [..., {in_features}], got shape {list(x.shape)}")
    rank = lora_A.shape[0] if lora_A.ndim == 2 else 0
    if lora_A.ndim != 2 or lora_A.shape[1] != in_features or rank < 1:
        swapped = "; did you pass lora_A.T?" if lora_A.ndim == 2 and lora_A.shape[0] == in_features else ""
        raise ValueError(
            f"lora_A must be [rank, in_features] = [≥ 1, {in_features}], got {list(lora_A.shape)}{swapped}"
        )
    expected = {"lora_B": (lora_B, [out_features, rank]), "magnitude": (magnitude, [out_features])}
    if bias is not None:
        expected["bias"] = (bias, [out_features])
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            swapped = "; did you pass lora_B.T?" if name == "lora_B" and list(tensor.T.shape) == shape else ""
            raise ValueError(f"{name} must be {shape}, got {list(tensor.shape)}{swapped}")
    tensors = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "magnitude": magnitude, "bias": bias, "x": x}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move one of them")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight must be frozen: call weight.requires_grad_(False), DoRA trains A, B and the magnitude")
    if rounding not in ("dithered", "nearest"):
        raise ValueError(f'rounding must be "dithered" or "nearest", got {rounding!r}')
    if dropout_mode not in ("lora", "peft"):
        raise ValueError(f'dropout_mode must be "lora" or "peft", got {dropout_mode!r}')
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")


def _cast(ops, factor, dtype, rounded):
    return factor if factor.dtype == dtype else ops.scaled_cast(factor, dtype, **rounded)


def _given(frozen_scale):
    return {} if frozen_scale is None else {"weight_norm": frozen_scale[0], "mag_norm_scale": frozen_scale[1]}


def _to(grad, dtype):
    return None if grad is None else grad.to(dtype)
