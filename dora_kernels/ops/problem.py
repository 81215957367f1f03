"""What a call is, as far as the choice of its form goes."""

from typing import NamedTuple

import torch

from .base_weights import Weight, is_packed


class Problem(NamedTuple):
    """What `choose` decides by: a call's sizes and dtypes, and what it computes beside the plain output."""

    tokens: int
    out_features: int
    in_features: int
    rank: int
    dtype: torch.dtype
    device: torch.device
    adapter_dtype: torch.dtype = torch.float32
    has_bias: bool = False
    dropout: str | None = None  # the mode, where dropout is active
    trains: bool = True
    trains_magnitude: bool = True
    is_packed: bool = False  # the weight is quantised, and the operations decode it
    merge_aware: bool = False  # W' is quantised as it will be served


def problem_of(
    weight: Weight,
    lora_A: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    tokens: int,
    dtype: torch.dtype,
    dropout: str | None,
    trains: bool,
    merge_aware: bool = False,
) -> Problem:
    """The problem of a call with these tensors, computed in `dtype`."""
    return Problem(
        tokens,
        *weight.shape,
        rank=lora_A.shape[0],
        dtype=dtype,
        device=weight.device,
        adapter_dtype=lora_A.dtype,
        has_bias=bias is not None,
        dropout=dropout,
        trains=trains,
        trains_magnitude=trains and magnitude.requires_grad,
        is_packed=is_packed(weight),
        merge_aware=merge_aware,
    )
