"""DoRA layers that multiply one input, side by side: what a block of layers computes for all of them at once.

Of members i, with N_i features and rank R_i: A [ΣR, K] and W' [ΣN, K] are stacked, h = x Aᵀ [M, ΣR].
"""

from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import torch

from .base_weights import Weight, dense
from .chunked import mm_fp32
from .output import OutputUse
from .types import Rounding


class Member(NamedTuple):
    """One layer, as `dora_linear` takes it."""

    weight: Weight  # [N, K]
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    bias: torch.Tensor | None
    scaling: float
    rounding: Rounding
    use: OutputUse | None = None  # shared by the calls of the layer

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.lora_A, self.lora_B, self.magnitude

    @property
    def features(self) -> int:
        return self.weight.shape[0]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]


TENSORS = 5
"""Of a member: W, A, B, m and b. The rest are constants of a call."""


def tensors_of(members: list[Member]) -> list:
    """The members' tensors in a row, as an autograd function takes them."""
    return [tensor for member in members for tensor in member[:TENSORS]]


def constants_of(members: list[Member]) -> tuple[tuple, ...]:
    """What of each member is no tensor."""
    return tuple(member[TENSORS:] for member in members)


def members_of(tensors: list, constants: tuple[tuple, ...]) -> list[Member]:
    """The members again, of their tensors in a row and of each one's constants."""
    parts = [tensors[start : start + TENSORS] for start in range(0, len(tensors), TENSORS)]
    return [Member(*part, *own) for part, own in zip(parts, constants)]


def without_quantized(tensors: list) -> tuple[list, list]:
    """What of the members' tensors autograd can save, and each member's weight that is no tensor: its library's memory,
    which nothing here writes."""
    quantized = [None if isinstance(weight, torch.Tensor) else weight for weight in tensors[::TENSORS]]
    return [tensor if isinstance(tensor, torch.Tensor) else None for tensor in tensors], quantized


def with_quantized(tensors: list, quantized: list) -> list:
    """The members' tensors again."""
    tensors = list(tensors)
    for index, weight in enumerate(quantized):
        tensors[TENSORS * index] = tensors[TENSORS * index] if weight is None else weight
    return tensors


class BlockOptions(NamedTuple):
    """What a layer asks of a block that computes it: see `dora_linear`."""

    space: str
    impl: str


def _slices(sizes: list[int]) -> list[slice]:
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes))]


def feature_slices(members: list[Member]) -> list[slice]:
    """Each member's part of ΣN."""
    return _slices([member.features for member in members])


def rank_slices(members: list[Member]) -> list[slice]:
    """Each member's part of ΣR."""
    return _slices([member.rank for member in members])


def products(ops: ModuleType, members: list[Member], x: torch.Tensor) -> list[torch.Tensor]:
    """z = x Wᵀ [M, N] of each member."""
    return [x @ dense(member.weight, x.dtype, ops).T for member in members]


def grad_h(grads: list[torch.Tensor], scaled_B: list[torch.Tensor]) -> torch.Tensor:
    """dh [M, ΣR]: each member's dy (s g ⊙ B), or dz (s B); the second factors are [N, R] in the dtype of the first."""
    if len(grads) == 1:
        return grads[0] @ scaled_B[0]
    if torch.compiler.is_compiling():
        return torch.cat([grad @ own for grad, own in zip(grads, scaled_B)], dim=1)
    ranks = _slices([own.shape[1] for own in scaled_B])
    found = grads[0].new_empty(grads[0].shape[0], ranks[-1].stop)
    for grad, own, columns in zip(grads, scaled_B, ranks):
        torch.mm(grad, own, out=found[:, columns])
    return found


def grad_A(members: list[Member], dh: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    """dA = dhᵀ x of each member [R, K], of one GEMM, in fp32 for fp32 adapters."""
    dtype = members[0].lora_A.dtype
    stack = dh.T @ x if dtype == x.dtype else mm_fp32(dh.T, x).to(dtype)
    return [stack[own] for own in rank_slices(members)]


def grad_x_of_products(
    ops: ModuleType, members: list[Member], dh: torch.Tensor, A: torch.Tensor, grads: list[torch.Tensor]
) -> torch.Tensor:
    """dx [M, K] = dh A + Σ dz W, summed inside the GEMMs."""
    # The small product comes first: its rounding is small beside the sum's.
    grad_x = dh @ A
    for index in smallest_first(members):
        grad_x.addmm_(grads[index], dense(members[index].weight, grad_x.dtype, ops))
    return grad_x


def smallest_first(members: list[Member]) -> list[int]:
    """The order in which their parts of dx are summed: in 16 bits each sum so far is rounded."""
    # Compiled for any size, sizes are not compared.
    if len(members) == 1 or torch.compiler.is_compiling():
        return list(range(len(members)))
    return sorted(range(len(members)), key=lambda index: members[index].features)


def stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One below the other; a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def why_not_together(members: list[Member], device: torch.device) -> str | None:
    """Why these layers do not compute one input on `device` together, or None."""
    first = members[0]
    for member in members:
        if not all(factor.requires_grad for factor in member.factors):
            return "a factor does not train"
        if member.weight.requires_grad:
            return "a weight trains"
        if member.bias is not None and member.bias.requires_grad:
            return "a bias trains"
        if any(part.device != device for part in (member.weight, *member.factors)):
            return "its layers and their input are on several devices"
        if any(factor.dtype != first.lora_A.dtype for factor in member.factors):
            return "its factors have several dtypes"
        if _format(member.weight) != _format(first.weight):
            return "its weights have several formats"
    return None


def _format(weight: Weight) -> tuple:
    return torch.Tensor if isinstance(weight, torch.Tensor) else type(weight), weight.dtype
