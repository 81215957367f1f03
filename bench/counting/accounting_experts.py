"""The traffic of the kernels of fused experts. Every expert is taken to have tokens, and as many tiles of them as there
may be."""

import math

import triton

from .accounting_parts import Traffic, adapted_traffic, padded_rank, rate, size


def expert_norm(a) -> Traffic:
    columns, experts = a.grid
    adapted = adapted_traffic(a, programs_k=1, blocks_k=triton.cdiv(a.K, a.CONFIG.block_k))
    ends = columns * (2 * experts - 1) * size(a.ends_ptr) if a.HAS_ENDS else 0
    vectors = a.N * size(a.m_ptr)
    return adapted._replace(
        loaded=experts * (adapted.loaded + vectors) + ends,
        unique=experts * (adapted.unique + vectors),
        stored=2 * experts * a.N * size(a.norm_ptr),
        flops=experts * adapted.flops,
    )


def expert_rescale_fwd(a) -> Traffic:
    (tokens, _), columns = a.z_ptr.shape, triton.cdiv(a.N, a.CONFIG.block_n)
    z, h, b = tokens * a.N * size(a.z_ptr), tokens * size(a.h_ptr), a.N * a.R * size(a.b_ptr)
    vectors = a.N * size(a.scale_ptr) + (a.N * size(a.bias_ptr) if a.HAS_BIAS else 0)
    h_columns = min(a.R, a.DOT.block_r) + (0 if a.DOT.one_block else a.R)
    return Traffic(
        _ends(a) + z + h * h_columns * columns + (b + vectors) * (a.grid[0] // columns),
        z + h * a.R + (b + vectors) * a.E,
        tokens * a.N * size(a.y_ptr),
        2 * tokens * a.N * padded_rank(a),
        rate(a),
    )


def expert_glu_fwd(a) -> Traffic:
    gate_and_up = _gate_and_up(a)
    return gate_and_up._replace(stored=a.z_ptr.shape[0] * a.N * size(a.a_ptr))


def expert_glu_bwd(a) -> Traffic:
    gate_and_up, grad_a = _gate_and_up(a), a.z_ptr.shape[0] * a.N * size(a.grad_a_ptr)
    return gate_and_up._replace(
        loaded=gate_and_up.loaded + grad_a, unique=gate_and_up.unique + grad_a, stored=2 * grad_a
    )


def _gate_and_up(a) -> Traffic:
    """What makes gate's and up's outputs."""
    tokens, columns = a.z_ptr.shape[0], triton.cdiv(a.N, a.CONFIG.block_n)
    z, h, b = 2 * tokens * a.N * size(a.z_ptr), tokens * size(a.h_ptr), 2 * a.N * a.R * size(a.b_ptr)
    scales = 2 * a.N * size(a.scale_ptr)
    h_columns = min(a.R, a.DOT.block_r) + (0 if a.DOT.one_block else 2 * a.R)
    return Traffic(
        _ends(a) + z + h * h_columns * columns + (b + scales) * (a.grid[0] // columns),
        z + h * a.R + (b + scales) * a.E,
        0,
        4 * tokens * a.N * padded_rank(a),
        rate(a),
    )


def expert_sums(a) -> Traffic:
    (tokens, _), (columns, tiles, parts) = a.dy_ptr.shape, a.grid
    dy = tokens * a.N * size(a.dy_ptr)
    unique = dy + (tokens * a.N * size(a.saved_ptr) if a.NEEDS.correlation else 0)
    loaded, stored, flops = _ends(a) + parts * unique, dy if a.NEEDS.base else 0, 0
    if a.NEEDS.base:
        scale = a.N * size(a.scale_ptr)
        loaded, unique = loaded + parts * tiles * scale, unique + a.E * scale
    if a.NEEDS.product:
        h = tokens * a.R * size(a.h_ptr)
        loaded, unique, flops = loaded + columns * h, unique + h, 2 * tokens * a.N * padded_rank(a)
        stored += tiles * a.N * a.R * size(a.product_ptr)
    if a.NEEDS.correlation:
        stored += tiles * a.N * size(a.correlation_ptr)
    return Traffic(loaded, unique, stored, flops, rate(a))


def expert_sums_finish(a) -> Traffic:
    features, stored = a.E * a.N, 0
    loaded = _ends(a) + (features * size(a.scale_ptr) if a.HAS_SCALE else 0)
    # Tiles behind the last one are not read: how many there are, the routing says.
    tiles = (a.product_ptr if a.NEEDS_PRODUCT or a.FROM_BASE else a.correlation_ptr).shape[0]
    if a.NEEDS_PRODUCT or a.FROM_BASE:
        loaded += tiles * a.N * a.R * size(a.product_ptr)
        loaded += features * a.R * size(a.b_ptr) if a.FROM_BASE else 0
        stored += features * a.R * size(a.out_ptr) if a.NEEDS_PRODUCT else 0
    if a.NEEDS_MAGNITUDE:
        loaded += tiles * a.N * size(a.correlation_ptr) + features * size(a.norm_ptr)
        stored += features * size(a.dm_ptr)
    return Traffic(loaded, loaded, stored)


def _ends(a) -> int:
    """Where each expert's tokens start and end, which every program reads."""
    return math.prod(a.grid) * (2 * a.E - 1) * size(a.ends_ptr)
