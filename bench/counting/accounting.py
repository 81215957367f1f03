"""What each Triton kernel of the engine reads, writes and multiplies, from the arguments of its launch alone.

`loaded` counts every load, as the kernel's loops make them: what programs read again is served by the L2 cache where it
fits. `unique` counts each element of an input once: what must come from memory. Both leave masked lanes out, and what
is read only where a sum of squares has left fp32's range. A test holds loads and stores against those that the kernels
make under the interpreter.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace

import triton

from .accounting_experts import (
    expert_glu_bwd,
    expert_glu_fwd,
    expert_norm,
    expert_rescale_fwd,
    expert_sums,
    expert_sums_finish,
)
from .accounting_glu import glu_bwd, glu_fwd
from .accounting_parts import Traffic, adapted_traffic, padded_rank, rate, size, weight_bytes
from .accounting_stacked import stacked_merge, stacked_norm, stacked_norm_finish


def of_launch(kernel, grid: tuple[int, ...], args: tuple) -> Traffic:
    """Of `kernel[grid](*args)`."""
    names = inspect.signature(kernel.fn).parameters
    return ACCOUNTS[kernel.fn.__name__](SimpleNamespace(grid=grid, **dict(zip(names, args))))


def _scaled_cast(a) -> Traffic:
    elements = a.rows * a.columns
    unique, loaded = elements * size(a.factor_ptr), elements * size(a.factor_ptr)
    if a.HAS_SCALE:
        unique += a.rows * size(a.scale_ptr)
        loaded += a.rows * triton.cdiv(a.columns, a.BLOCK_COLUMNS) * size(a.scale_ptr)
    return Traffic(loaded, unique, elements * size(a.out_ptr))


def _decode(a) -> Traffic:
    loaded, unique = weight_bytes(a, a.BLOCK_N, a.BLOCK_K)
    return Traffic(loaded, unique, a.N * a.K * size(a.decoded_ptr))


def _cast(a, mode: str | None) -> tuple[int, int]:
    """Bytes loaded and stored for A's copy in the compute dtype."""
    return (0, 0) if mode is None else (a.R * a.K * size(a.a_ptr), a.R * a.K * size(a.cast_ptr))


def _weight_norm(a) -> Traffic:
    splits = a.CONFIG.splits
    adapted = adapted_traffic(a, programs_k=splits, blocks_k=triton.cdiv(a.K, a.CONFIG.block_k))
    cast_loaded, cast_stored = _cast(a, a.CAST_MODE)
    magnitude = a.N * size(a.m_ptr) if splits == 1 else 0
    vectors = 2 if splits == 1 else 3 * splits
    return adapted._replace(
        loaded=adapted.loaded + cast_loaded + magnitude,
        unique=adapted.unique + magnitude,
        stored=cast_stored + vectors * a.N * size(a.norm_ptr),
    )


def _weight_norm_finish(a) -> Traffic:
    loaded = a.SPLITS * a.N * size(a.partial_ptr) + a.N * size(a.m_ptr)
    return Traffic(loaded, loaded, 2 * a.N * size(a.norm_ptr))


def _compare_factors(a) -> Traffic:
    """Where nothing changed."""
    factors = a.R * a.K * size(a.a_ptr) + a.N * a.R * size(a.b_ptr) + a.N * size(a.m_ptr)
    return Traffic(2 * factors, 2 * factors, a.grid[0] * size(a.changed_ptr))


def _kept_norm(a) -> Traffic:
    """Where nothing changed: no program reads W."""
    answers, vectors = a.changed_ptr.numel() * size(a.changed_ptr), 2 * a.N * size(a.norm_ptr)
    return Traffic(a.grid[0] * answers + vectors, answers + vectors, vectors)


def _kept_merge(a) -> Traffic:
    """Where nothing changed: nothing but the answers is read."""
    answers = a.changed_ptr.numel() * size(a.changed_ptr)
    return Traffic(a.grid[0] * answers, answers, 0)


def _merge_scale(a) -> Traffic:
    blocks_k = triton.cdiv(a.K, a.CONFIG.block_k)
    columns = max(1, blocks_k)
    adapted = adapted_traffic(a, programs_k=columns, blocks_k=blocks_k)
    cast_loaded, cast_stored = _cast(a, a.STORE.cast_mode)
    splits = a.STORE.splits
    if splits == 1:
        vectors, kept = a.N * size(a.scale_ptr), 0
    else:
        vectors, kept = splits * a.N * size(a.partial_ptr) + a.N * size(a.m_ptr), 2 * a.N * size(a.norm_ptr)
    return adapted._replace(
        loaded=adapted.loaded + columns * vectors + cast_loaded,
        unique=adapted.unique + vectors,
        stored=a.N * a.K * size(a.merged_ptr) + kept + cast_stored,
    )


def _rescale_fwd(a) -> Traffic:
    rows, columns = triton.cdiv(a.M, a.CONFIG.block_m), triton.cdiv(a.N, a.CONFIG.block_n)
    z, h, b = a.M * a.N * size(a.z_ptr), a.M * size(a.h_ptr), a.N * a.R * size(a.b_ptr)
    vectors = a.N * size(a.scale_ptr) + (a.N * size(a.bias_ptr) if a.HAS_BIAS or a.BASE_HAS_BIAS else 0)
    inputs = z + (a.M * a.N * size(a.undropped_ptr) if a.HAS_UNDROPPED else 0)
    h_columns = min(a.R, a.DOT.block_r) + (0 if a.DOT.one_block else a.R)
    return Traffic(
        inputs + h * h_columns * columns + (b + vectors) * rows,
        inputs + h * a.R + b + vectors,
        a.M * a.N * size(a.y_ptr),
        2 * a.M * a.N * padded_rank(a),
        rate(a),
    )


def _rescale_bwd(a) -> Traffic:
    columns, chunks = a.grid
    dy = a.M * a.N * size(a.dy_ptr)
    loaded = unique = dy + (a.M * a.N * size(a.saved_ptr) if a.NEEDS.correlation else 0)
    stored = dy if a.NEEDS.base else 0
    flops = 0
    if a.NEEDS.base:
        loaded, unique = loaded + chunks * a.N * size(a.scale_ptr), unique + a.N * size(a.scale_ptr)
    if a.SAVED_HAS_BIAS:
        loaded, unique = loaded + chunks * a.N * size(a.base_bias_ptr), unique + a.N * size(a.base_bias_ptr)
    if a.NEEDS.product:
        h = a.M * a.R * size(a.h_ptr)
        loaded, unique, flops = loaded + columns * h, unique + h, 2 * a.M * a.N * a.DOT.block_r
        stored += chunks * a.N * a.R * size(a.product_ptr)
    if a.NEEDS.correlation:
        stored += chunks * a.N * size(a.correlation_ptr)
    if a.NEEDS.bias:
        stored += chunks * a.N * size(a.bias_ptr)
    return Traffic(loaded, unique, stored, flops, rate(a))


def _rescale_bwd_finish(a) -> Traffic:
    finish, features = a.FINISH, a.grid[1] * a.N
    factors = features * a.R
    loaded, stored = 0 if finish.holds_scale else features * size(a.scale_ptr), 0
    from_base = finish.needs_magnitude and finish.from_base
    if finish.needs_magnitude:
        loaded += (a.chunks * size(a.correlation_ptr) + size(a.norm_ptr)) * features
        stored += features * size(a.dm_ptr)
    if finish.needs_bias:
        loaded += a.chunks * features * size(a.bias_ptr)
        stored += features * size(a.dbias_ptr)
    if finish.needs_B or from_base:
        loaded += a.product_chunks * factors * size(a.product_ptr)
        stored += factors * size(a.db_lora_ptr) if finish.needs_B else 0
    if from_base or finish.cast_mode is not None:
        loaded += factors * size(a.b_ptr)
        stored += factors * size(a.cast_ptr) if finish.cast_mode is not None else 0
    return Traffic(loaded, loaded, stored)


ACCOUNTS: dict[str, Callable[[SimpleNamespace], Traffic]] = {
    "_scaled_cast_kernel": _scaled_cast,
    "_weight_norm_kernel": _weight_norm,
    "_weight_norm_finish_kernel": _weight_norm_finish,
    "_merge_scale_kernel": _merge_scale,
    "_compare_factors_kernel": _compare_factors,
    "_kept_norm_kernel": _kept_norm,
    "_kept_merge_kernel": _kept_merge,
    "_decode_kernel": _decode,
    "_expert_glu_fwd_kernel": expert_glu_fwd,
    "_expert_glu_bwd_kernel": expert_glu_bwd,
    "_expert_norm_kernel": expert_norm,
    "_expert_rescale_fwd_kernel": expert_rescale_fwd,
    "_expert_sums_kernel": expert_sums,
    "_expert_sums_finish_kernel": expert_sums_finish,
    "_glu_fwd_kernel": glu_fwd,
    "_glu_bwd_kernel": glu_bwd,
    "_stacked_merge_kernel": stacked_merge,
    "_stacked_norm_kernel": stacked_norm,
    "_stacked_norm_finish_kernel": stacked_norm_finish,
    "_rescale_fwd_kernel": _rescale_fwd,
    "_rescale_bwd_kernel": _rescale_bwd,
    "_rescale_bwd_finish_kernel": _rescale_bwd_finish,
}
