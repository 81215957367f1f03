"""The tensors that a packed weight is made of."""

from typing import NamedTuple

import torch

from .sharding import sharding_of


def check_parts(weight: NamedTuple, shapes: dict[str, tuple[int, ...]], kind: str) -> None:
    """Raises ValueError where a tensor of the weight, by its field's name, has another shape, is on another device, or
    is held by this process in part. `kind` names the weight's library."""
    N, K = weight.shape
    for name, shape in shapes.items():
        tensor: torch.Tensor | None = getattr(weight, name)
        if tensor is None:
            continue
        if sharding := sharding_of(tensor):
            raise ValueError(f"the {name} of this {kind} weight are {sharding}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"this {kind} weight has {name} {list(tensor.shape)}; {N} x {K} in groups of {weight.group} have "
                f"{list(shape)}"
            )
        if tensor.device != weight.device:
            raise ValueError(f"this {kind} weight is on {weight.device} and its {name} on {tensor.device}")
