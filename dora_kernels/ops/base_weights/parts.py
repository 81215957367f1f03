"""The tensors that a packed weight is made of, and what the formats answer alike."""

from types import ModuleType
from typing import NamedTuple

import torch

from .sharding import sharding_of


class _Alike:
    """Of a weight that the operations decode; the first field of its tuple lies where all of it does."""

    requires_grad = False
    is_packed = True

    @property
    def device(self) -> torch.device:
        return self[0].device

    @property
    def is_cuda(self) -> bool:
        return self[0].is_cuda

    def readable(self) -> NamedTuple:
        return self

    def dense(self, dtype: torch.dtype, ops: ModuleType) -> torch.Tensor:
        return ops.decode(self, dtype)


def packed(format_class: type) -> type:
    """Gives the class of a packed format, a NamedTuple, which can have no base class, what all of them answer alike."""
    for name in ("requires_grad", "is_packed", "device", "is_cuda", "readable", "dense"):
        setattr(format_class, name, vars(_Alike)[name])
    return format_class


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
