"""`dora_linear`: checks, flattening, dispatch, then `DoraLinearFunction`."""

import math

import torch
import torch.nn.functional as F

from . import dispatch
from .autograd import Call, DoraLinearFunction
from .quantized import Nf4Weight, Weight, of_params4bit, sharding_of


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
    call = Call(plan.space, plan.impl, float(scaling), rounding, int(salt), dropout, trains)
    y = DoraLinearFunction.apply(x_flat, x_dropped, lora_A, lora_B, magnitude, bias, weight, frozen_scale, call)
    return y.view(*x.shape[:-1], weight.shape[0])


def check_arguments(x, weight, lora_A, lora_B, magnitude, bias, rounding, lora_dropout, dropout_mode) -> None:
    """Raises a ValueError or TypeError that names the argument, what was expected and what came."""
    tensors = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "magnitude": magnitude, "bias": bias, "x": x}
    for name, tensor in tensors.items():
        if sharding := sharding_of(tensor):
            raise TypeError(f"{name} is {sharding}")
    if len(weight.shape) != 2:
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
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
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
