"""Checks of the arguments of `dora_linear`, `dora_conv` and `dora_embedding`, before any work."""

import torch

from .base_weights import Weight, sharding_of


def check_arguments(x, weight, lora_A, lora_B, magnitude, bias, rounding, lora_dropout, dropout_mode) -> None:
    """Raises a ValueError or TypeError that names the argument, what was expected and what came."""
    check_whole({"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "magnitude": magnitude, "bias": bias, "x": x})
    if len(weight.shape) != 2:
        raise ValueError(f"weight must be [out_features, in_features], got shape {list(weight.shape)}")
    in_features = weight.shape[1]
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x must be [..., in_features] = [..., {in_features}], got shape {list(x.shape)}")
    check_factors(x, weight, lora_A, lora_B, magnitude, bias)
    check_placement(x, {"x": x})
    check_options(rounding, lora_dropout, dropout_mode)


def check_whole(tensors: dict[str, torch.Tensor | Weight | None]) -> None:
    """Raises TypeError where this process holds a part of one of the named tensors."""
    for name, tensor in tensors.items():
        if sharding := sharding_of(tensor):
            raise TypeError(f"{name} is {sharding}")


def check_factors(x, weight, lora_A, lora_B, magnitude, bias) -> None:
    """Raises where these do not fit W [N, K], or lie on another device than x."""
    out_features, in_features = weight.shape
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
    check_placement(x, {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "magnitude": magnitude, "bias": bias})
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight must be frozen: call weight.requires_grad_(False), DoRA trains A, B and the magnitude")


def check_placement(x: torch.Tensor, tensors: dict[str, torch.Tensor | Weight | None]) -> None:
    """Raises where one of the named tensors is of integers, or on another device than x."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move one of them")


def check_options(rounding: str, lora_dropout: float = 0.0, dropout_mode: str = "lora") -> None:
    """Raises ValueError for an option that does not exist."""
    if rounding not in ("dithered", "nearest"):
        raise ValueError(f'rounding must be "dithered" or "nearest", got {rounding!r}')
    if dropout_mode not in ("lora", "peft"):
        raise ValueError(f'dropout_mode must be "lora" or "peft", got {dropout_mode!r}')
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")


def refuse_tracing() -> None:
    """Raises RuntimeError inside `torch.jit.trace`."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record a DoRA layer: merge_dora the model first, or use torch.compile"
        )


def dtype_of_call(x: torch.Tensor, weight: Weight) -> torch.dtype:
    """What x is computed in: autocast's dtype, or its own. Raises TypeError where a matrix has another."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    if isinstance(weight, torch.Tensor) and x.dtype != weight.dtype:
        raise TypeError(
            f"x and weight must have one dtype outside autocast, got x {x.dtype} and weight {weight.dtype}; "
            f"cast x with x.to({weight.dtype}) or run under torch.autocast"
        )
    return x.dtype
