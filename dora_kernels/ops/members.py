"""DoRA layers that multiply one input, side by side: what a block of layers computes for all of them at once.

Of members i, with N_i features and rank R_i: A [ΣR, K] and W' [ΣN, K] are stacked, h = x Aᵀ [M, ΣR].
"""

from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import torch

from .accumulation import keep_norm, kept_norm
from .base_weights import Weight, dense, readable
from .chunked import mm_fp32
from .kept_weight import Rows, kept_weight
from .output import OutputUse
from .recomputation import remember_norm, remembered_norm
from .types import Adapted, NormScale, Rounding


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


def norms_and_A(ops: ModuleType, members: list[Member], dtype: torch.dtype) -> tuple[NormScale, torch.Tensor]:
    """n and g [ΣN], and A [ΣR, K] in `dtype`: the norm's pass, of all layers or of each, writes its part of them."""
    norm_scale, known = _norms_so_far(ops, members)
    if all(known):
        return norm_scale, stacked_A(ops, members, dtype)
    same, first = members[0].lora_A.dtype == dtype, members[0].lora_A
    A = None if same else torch.empty(rank_slices(members)[-1].stop, first.shape[1], dtype=dtype, device=first.device)
    if not any(known) and in_one_launch(members):
        ops.stacked_norm(_adapted(members), into=norm_scale, A_into=A)
        _leave(members, known, norm_scale)
        return norm_scale, stacked_A(ops, members, dtype) if A is None else A
    for member, is_known, rows, ranks in zip(members, known, feature_slices(members), rank_slices(members)):
        if is_known:
            if not same:
                A[ranks].copy_(ops.scaled_cast(member.lora_A, dtype, rounding=member.rounding))
            continue
        ops.weight_norm(
            readable(member.weight), *member.factors, member.scaling, A_dtype=None if same else dtype,
            rounding=member.rounding, into=_part(norm_scale, rows), A_into=None if same else A[ranks],
        )  # fmt: skip
    _leave(members, known, norm_scale)
    return norm_scale, stacked_A(ops, members, dtype) if A is None else A


def stacked_A(ops: ModuleType, members: list[Member], dtype: torch.dtype) -> torch.Tensor:
    """A [ΣR, K] in `dtype`."""
    return stacked([
        member.lora_A
        if member.lora_A.dtype == dtype
        else ops.scaled_cast(member.lora_A, dtype, rounding=member.rounding)
        for member in members
    ])  # fmt: skip


def merged(
    ops: ModuleType, members: list[Member], dtype: torch.dtype, norm_scale: NormScale | None = None
) -> tuple[torch.Tensor, NormScale]:
    """W' [ΣN, K] in `dtype`, to the bits of each layer's own merge, and n and g [ΣN]; those of the forward if given."""
    return _merged(ops, members, dtype, norm_scale, None)


def merged_and_A(
    ops: ModuleType, members: list[Member], dtype: torch.dtype, norm_scale: NormScale
) -> tuple[torch.Tensor, torch.Tensor]:
    """W' as `merged` gives it, and A [ΣR, K] in `dtype`, which the same pass writes where A has another dtype."""
    first = members[0].lora_A
    if first.dtype == dtype:
        return _merged(ops, members, dtype, norm_scale, None)[0], stacked_A(ops, members, dtype)
    A = torch.empty(rank_slices(members)[-1].stop, first.shape[1], dtype=dtype, device=first.device)
    return _merged(ops, members, dtype, norm_scale, A)[0], A


def _merged(ops, members, dtype, norm_scale, A):
    first, rows, given = members[0], feature_slices(members), norm_scale is not None
    norms, known = (norm_scale, [True] * len(members)) if given else _norms_so_far(ops, members)
    shape, device = (rows[-1].stop, first.lora_A.shape[1]), first.lora_A.device
    layers = [Rows(member.use, member.scaling, member.rounding) for member in members]
    kept = None if given else kept_weight(layers, known, shape, dtype, device)
    if kept is None and in_one_launch(members) and len(set(known)) == 1:
        weight, _ = ops.stacked_merge(
            _adapted(members), dtype=dtype, norm_scale=norms if known[0] else None, into=norms, A_into=A
        )
    else:
        weight = torch.empty(shape, dtype=dtype, device=device) if kept is None else kept.merged
        for index, (member, own, ranks) in enumerate(zip(members, rows, rank_slices(members))):
            W, into = readable(member.weight), _part(norms, own)
            if kept is not None and kept.has(index, known[index]):
                kept.bring_up_to_date(ops, index, W, *member.factors[:2], into, weight[own])
                continue
            ops.merge(
                W, *member.factors, member.scaling, dtype=dtype, rounding=member.rounding,
                norm_scale=into if known[index] else None, out=weight[own], into=into,
                A_into=None if A is None else A[ranks],
            )  # fmt: skip
    _leave(members, known, norms)
    return weight if kept is None else kept.taken(), norms


def in_one_launch(members: list[Member]) -> bool:
    """Whether one launch makes all norms, and one all W': of two or three weights that are contiguous matrices, and
    adapters of one rank, one scaling and one mode of rounding. Other members get launches of their own."""
    alike = {(member.rank, member.scaling, member.rounding.mode) for member in members}
    weights = [member.weight for member in members]
    return (
        2 <= len(weights) <= 3
        and len(alike) == 1
        and all(isinstance(weight, torch.Tensor) and weight.is_contiguous() and weight.numel() for weight in weights)
    )


def _adapted(members):
    return [Adapted(readable(member.weight), *member.factors, member.scaling, member.rounding) for member in members]


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


def _norms_so_far(ops, members):
    """Memory for n and g [ΣN], and of each member whether an earlier call left them there."""
    first = members[0]
    dtypes = {first.weight.dtype, *(factor.dtype for factor in first.factors)}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    norm = torch.empty(feature_slices(members)[-1].stop, dtype=dtype, device=first.lora_A.device)
    norms = NormScale(norm, torch.empty_like(norm))
    return norms, [_is_known(ops, each, _part(norms, rows)) for each, rows in zip(members, feature_slices(members))]


def _part(norm_scale: NormScale, rows: slice) -> NormScale:
    return NormScale(norm_scale.norm[rows], norm_scale.scale[rows])


def _is_known(ops: ModuleType, member: Member, into: NormScale) -> bool:
    """Whether an earlier call left n and g, which `into` takes: see `recomputation` and `accumulation`."""
    known = remembered_norm(member.use, member.factors, member.scaling)
    if known is not None:
        into.norm.copy_(known.norm)
        into.scale.copy_(known.scale)
        return True
    return kept_norm(ops, member.use, member.weight, member.factors, member.scaling, into) is not None


def _leave(members, known, norms):
    """Leaves n and g that were not known to later calls."""
    for member, is_known, rows in zip(members, known, feature_slices(members)):
        if not is_known:
            found = _part(norms, rows)
            remember_norm(member.use, member.factors, member.scaling, found)
            keep_norm(member.use, member.factors, member.scaling, found)


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
