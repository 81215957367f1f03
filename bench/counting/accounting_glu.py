"""The traffic of the passes over a gated MLP's gate and up."""

import triton

from .accounting_parts import Traffic, padded_rank, rate, rate_of, size


def glu_fwd(a) -> Traffic:
    columns, chunks = a.grid
    blocks_m = triton.cdiv(a.M, a.CONFIG.block_m)
    vectors_m = chunks if a.DOT.one_block else blocks_m
    layers = _glu_layers(a, columns=columns, blocks_m=blocks_m, loads_m=chunks, vectors_m=vectors_m)
    products = 2 * a.M * a.N * size(a.gate_ptr)
    return layers._replace(
        loaded=products + layers.loaded,
        unique=products + layers.unique,
        stored=a.M * a.N * size(a.a_ptr),
    )


def glu_bwd(a) -> Traffic:
    columns, chunks = a.grid
    blocks_m = triton.cdiv(a.M, a.CONFIG.block_m)
    layers = _glu_layers(a, columns=columns, blocks_m=blocks_m, loads_m=chunks, vectors_m=chunks)
    streamed = 3 * a.M * a.N * size(a.gate_ptr)
    loaded, unique, flops = layers.loaded, layers.unique, layers.flops
    stored = streamed + 2 * chunks * a.N * size(a.correlation_ptr)
    if a.FUSED_PRODUCT:
        # The rate is that of the product in token space, where there are two.
        flops, stored = flops + 4 * a.M * a.N * a.DOT.block_r, stored + 2 * chunks * a.N * a.R * size(a.product_ptr)
        if not a.GLU.in_token_space:
            h = a.M * _glu_h(a)
            loaded, unique = loaded + columns * h, unique + h
    rate = layers.rate if a.GLU.in_token_space else rate_of(a.PRODUCT)
    return Traffic(streamed + loaded, streamed + unique, stored, flops, rate)


def _glu_layers(a, *, columns: int, blocks_m: int, loads_m: int, vectors_m: int) -> Traffic:
    """What makes gate's and up's outputs of their products: h, B, g and b. g and b are loaded `vectors_m` times, B
    `loads_m` times where one block holds the rank."""
    vectors = 2 * a.N * size(a.bias_ptr) if a.GLU.has_bias else 0
    if not a.GLU.in_token_space:
        return Traffic(vectors_m * vectors, vectors, 0)
    vectors += 2 * a.N * size(a.scale_ptr)
    h, b = a.M * _glu_h(a), 2 * a.N * a.R * size(a.b_gate_ptr)
    h_loaded = h if a.DOT.one_block else h * a.DOT.block_r // a.R + 2 * a.M * a.R * size(a.h_ptr)
    return Traffic(
        columns * h_loaded + (loads_m if a.DOT.one_block else blocks_m) * b + vectors_m * vectors,
        h + b + vectors,
        0,
        4 * a.M * a.N * padded_rank(a),
        rate(a),
    )


def _glu_h(a) -> int:
    """Bytes of a token's h."""
    return a.R * size(a.h_ptr) * (1 if a.GLU.one_h else 2)
