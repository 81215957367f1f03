"""What the kernels of several layers in one launch read, write and multiply: what each layer's own would."""

from collections.abc import Iterator
from types import SimpleNamespace

import triton

from .accounting_parts import Traffic, adapted_traffic, rate, size


def stacked_norm(a) -> Traffic:
    splits, vector = a.CONFIG.splits, size(a.norm_ptr)
    parts = []
    for layer, own_splits in _layers(a):
        adapted = adapted_traffic(layer, programs_k=own_splits, blocks_k=triton.cdiv(a.K, a.CONFIG.block_k))
        magnitude, kept = layer.N * size(a.m_first_ptr), 2 if splits == 1 else 3 * own_splits + 1
        cast_loaded, cast_stored = _cast(a)
        parts.append(
            adapted._replace(
                loaded=adapted.loaded + cast_loaded + magnitude,
                unique=adapted.unique + magnitude,
                stored=cast_stored + kept * layer.N * vector,
            )
        )
    return _sum(a, parts)


def stacked_norm_finish(a) -> Traffic:
    rows, vector = zip(a.STACK.features, a.STACK.splits), size(a.norm_ptr)
    loaded = sum(features * (splits + 1) for features, splits in rows) * vector
    return Traffic(loaded, loaded, 2 * sum(a.STACK.features) * vector)


def stacked_merge(a) -> Traffic:
    blocks_k, vector = triton.cdiv(a.K, a.CONFIG.block_k), size(a.norm_ptr)
    columns = max(1, blocks_k)
    parts = []
    for layer, splits in _layers(a):
        adapted = adapted_traffic(layer, programs_k=columns, blocks_k=blocks_k)
        # n's partial sums, and m below them.
        vectors = layer.N * vector * (1 if a.SPLITS == 1 else splits + 1)
        kept = 0 if a.SPLITS == 1 else 2 * layer.N * vector
        cast_loaded, cast_stored = _cast(a)
        parts.append(
            adapted._replace(
                loaded=adapted.loaded + columns * vectors + cast_loaded,
                unique=adapted.unique + vectors,
                stored=layer.N * a.K * size(a.merged_ptr) + kept + cast_stored,
            )
        )
    return _sum(a, parts)


def _layers(a) -> Iterator[tuple[SimpleNamespace, int]]:
    """Each layer as its own launch would be accounted for, and its splits."""
    for features, splits in zip(a.STACK.features, a.STACK.splits):
        if features:
            pointers = {"w_ptr": a.w_first_ptr, "a_ptr": a.a_first_ptr, "b_ptr": a.b_first_ptr}
            sizes = {"N": features, "K": a.K, "R": a.R}
            yield SimpleNamespace(**pointers, **sizes, FORMAT=a.FORMAT, DOT=a.DOT, CONFIG=a.CONFIG), splits


def _cast(a) -> tuple[int, int]:
    """Bytes loaded and stored for a layer's A in the compute dtype."""
    return (0, 0) if a.STACK.cast_mode is None else (a.R * a.K * size(a.a_first_ptr), a.R * a.K * size(a.cast_ptr))


def _sum(a, parts: list[Traffic]) -> Traffic:
    loaded, unique, stored, flops = (sum(values) for values in zip(*(part[:4] for part in parts)))
    return Traffic(loaded, unique, stored, flops, rate(a))
