"""n, g and W' of layers of one input, side by side: in one launch, or in one of each layer."""

from types import ModuleType

import torch

from .accumulation import keep_norm, kept_norm
from .base_weights import readable
from .kept_weight import Rows, kept_weight
from .members import Member, feature_slices, rank_slices, stacked
from .recomputation import remember_norm, remembered_norm
from .types import Adapted, NormScale


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
            rounding=member.rounding, into=part_of(norm_scale, rows), A_into=None if same else A[ranks],
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
            W, into = readable(member.weight), part_of(norms, own)
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


def _norms_so_far(ops, members):
    """Memory for n and g [ΣN], and of each member whether an earlier call left them there."""
    first = members[0]
    dtypes = {first.weight.dtype, *(factor.dtype for factor in first.factors)}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    norm = torch.empty(feature_slices(members)[-1].stop, dtype=dtype, device=first.lora_A.device)
    norms = NormScale(norm, torch.empty_like(norm))
    return norms, [_is_known(ops, each, part_of(norms, rows)) for each, rows in zip(members, feature_slices(members))]


def part_of(norm_scale: NormScale, rows: slice) -> NormScale:
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
            found = part_of(norms, rows)
            remember_norm(member.use, member.factors, member.scaling, found)
            keep_norm(member.use, member.factors, member.scaling, found)
