"""What each Triton kernel of the engine reads, writes and multiplies, from the arguments of its launch alone.

`loaded` counts every load, as the kernel's loops make them: what programs read again is served by the L2 cache where it
fits. `unique` counts each element of an input once: what must come from memory. Both leave masked lanes out, and what
is read only where a sum of squares has left fp32's range. Every expert is taken to have tokens, and as many tiles of
them as there may be. A test holds loads and stores against those that the kernels
make under the interpreter.
"""

import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import triton


class Traffic(NamedTuple):
    """Of one launch: bytes, and FLOPs of its matrix products, at the `rate` of their number format."""

    loaded: int
    unique: int
    stored: int
    flops: int = 0
    rate: str = "bf16"

    @property
    def memory(self) -> int:
        """Bytes that must cross the memory bus at least once."""
        return self.unique + self.stored


def of_launch(kernel, grid: tuple[int, ...], args: tuple) -> Traffic:
    """Of `kernel[grid](*args)`."""
    names = inspect.signature(kernel.fn).parameters
    return ACCOUNTS[kernel.fn.__name__](SimpleNamespace(grid=grid, **dict(zip(names, args))))


def _scaled_cast(a) -> Traffic:
    elements = a.rows * a.columns
    unique, loaded = elements * _size(a.factor_ptr), elements * _size(a.factor_ptr)
    if a.HAS_SCALE:
        unique += a.rows * _size(a.scale_ptr)
        loaded += a.rows * triton.cdiv(a.columns, a.BLOCK_COLUMNS) * _size(a.scale_ptr)
    return Traffic(loaded, unique, elements * _size(a.out_ptr))


def _adapted(a, *, programs_k: int, blocks_k: int) -> Traffic:
    """V = W + s B A once: W; A by each program of rows; B's first block by each program, and B again in each block of
    K where one block does not hold the rank."""
    left = min(a.R, a.DOT.block_r) * programs_k + (0 if a.DOT.one_block else a.R * blocks_k)
    (weight_loaded, weight), rows = _weight(a, a.CONFIG.block_n, a.CONFIG.block_k), triton.cdiv(a.N, a.CONFIG.block_n)
    return Traffic(
        weight_loaded + rows * a.R * a.K * _size(a.a_ptr) + a.N * left * _size(a.b_ptr),
        weight + a.R * a.K * _size(a.a_ptr) + a.N * a.R * _size(a.b_ptr),
        0,
        2 * a.N * a.K * _padded_rank(a),
        _rate(a),
    )


def _weight(a, block_n: int, block_k: int) -> tuple[int, int]:
    """Bytes loaded, and unique ones, of W once: a matrix, or what is packed with its tables and statistics."""
    elements, form = a.N * a.K, a.FORMAT
    if form.fp8:
        rows, columns = form.scale_rows or a.N, form.scale_columns or a.K
        scales = triton.cdiv(a.N, rows) * triton.cdiv(a.K, columns)
        # Of a block's columns each row loads one scale, or each element its own.
        loads = a.N * triton.cdiv(a.K, block_k) if not form.scale_columns or columns % block_k == 0 else elements
        return elements + 4 * loads, elements + 4 * scales
    if form.int4:
        return _int4(a, block_n, block_k)
    if form.nf4_block == 0:
        return elements * _size(a.w_ptr), elements * _size(a.w_ptr)
    tiles = triton.cdiv(a.N, block_n) * triton.cdiv(a.K, block_k)
    if form.whole_blocks:
        group = min(form.nf4_block, block_k)
        codes, scales, lookups, tables = elements // 2, a.N * (a.K // group), block_n * (block_k // group), 2
    else:
        codes, scales, lookups, tables = elements, elements, block_n * block_k, 1
    blocks = triton.cdiv(elements, form.nf4_block)
    loaded = codes + scales * _size(a.absmax_ptr) + tiles * tables * 16 * _size(a.code_ptr)
    unique = triton.cdiv(elements, 2) + blocks * _size(a.absmax_ptr) + 16 * _size(a.code_ptr)
    if form.nested_block:
        nested, code, offset = (_size(p) for p in (a.nested_absmax_ptr, a.nested_code_ptr, a.offset_ptr))
        loaded += scales * nested + tiles * (lookups * code + offset)
        unique += triton.cdiv(blocks, form.nested_block) * nested + 256 * code + offset
    return loaded, unique


def _int4(a, block_n: int, block_k: int) -> tuple[int, int]:
    form, groups = a.FORMAT, a.K // a.FORMAT.group if a.FORMAT.group else 1
    words = triton.cdiv(a.N, 8) * a.K if form.words_along_outputs else a.N * triton.cdiv(a.K, 8)
    if not form.has_groups and form.group % block_k == 0:
        loads = a.N * triton.cdiv(a.K, block_k)
    elif not form.has_groups and block_k % form.group == 0:
        loads = a.N * groups
    else:
        loads = a.N * a.K
    loaded, unique = 4 * words + loads * _size(a.absmax_ptr), 4 * words + a.N * groups * _size(a.absmax_ptr)
    if form.has_zeros:
        loaded, unique = loaded + 4 * loads, unique + 4 * triton.cdiv(a.N, 8) * groups
    if form.has_groups:
        loaded, unique = loaded + 4 * a.K * triton.cdiv(a.N, block_n), unique + 4 * a.K
    return loaded, unique


def _decode(a) -> Traffic:
    loaded, unique = _weight(a, a.BLOCK_N, a.BLOCK_K)
    return Traffic(loaded, unique, a.N * a.K * _size(a.decoded_ptr))


def _cast(a) -> tuple[int, int]:
    """Bytes loaded and stored for A's copy in the compute dtype."""
    return (0, 0) if a.CAST_MODE is None else (a.R * a.K * _size(a.a_ptr), a.R * a.K * _size(a.cast_ptr))


def _weight_norm(a) -> Traffic:
    splits = a.CONFIG.splits
    adapted = _adapted(a, programs_k=splits, blocks_k=triton.cdiv(a.K, a.CONFIG.block_k))
    cast_loaded, cast_stored = _cast(a)
    magnitude = a.N * _size(a.m_ptr) if splits == 1 else 0
    vectors = 2 if splits == 1 else 3 * splits
    return adapted._replace(
        loaded=adapted.loaded + cast_loaded + magnitude,
        unique=adapted.unique + magnitude,
        stored=cast_stored + vectors * a.N * _size(a.norm_ptr),
    )


def _weight_norm_finish(a) -> Traffic:
    loaded = a.SPLITS * a.N * _size(a.partial_ptr) + a.N * _size(a.m_ptr)
    return Traffic(loaded, loaded, 2 * a.N * _size(a.norm_ptr))


def _merge_scale(a) -> Traffic:
    blocks_k = triton.cdiv(a.K, a.CONFIG.block_k)
    columns = max(1, blocks_k)
    adapted = _adapted(a, programs_k=columns, blocks_k=blocks_k)
    if a.SPLITS == 1:
        vectors, kept = a.N * _size(a.scale_ptr), 0
    else:
        vectors, kept = a.SPLITS * a.N * _size(a.partial_ptr) + a.N * _size(a.m_ptr), 2 * a.N * _size(a.norm_ptr)
    return adapted._replace(
        loaded=adapted.loaded + columns * vectors,
        unique=adapted.unique + vectors,
        stored=a.N * a.K * _size(a.merged_ptr) + kept,
    )


def _rescale_fwd(a) -> Traffic:
    rows, columns = triton.cdiv(a.M, a.CONFIG.block_m), triton.cdiv(a.N, a.CONFIG.block_n)
    z, h, b = a.M * a.N * _size(a.z_ptr), a.M * _size(a.h_ptr), a.N * a.R * _size(a.b_ptr)
    vectors = a.N * _size(a.scale_ptr) + (a.N * _size(a.bias_ptr) if a.HAS_BIAS or a.BASE_HAS_BIAS else 0)
    inputs = z + (a.M * a.N * _size(a.undropped_ptr) if a.HAS_UNDROPPED else 0)
    h_columns = min(a.R, a.DOT.block_r) + (0 if a.DOT.one_block else a.R)
    return Traffic(
        inputs + h * h_columns * columns + (b + vectors) * rows,
        inputs + h * a.R + b + vectors,
        a.M * a.N * _size(a.y_ptr),
        2 * a.M * a.N * _padded_rank(a),
        _rate(a),
    )


def _rescale_bwd(a) -> Traffic:
    columns, chunks = a.grid
    dy = a.M * a.N * _size(a.dy_ptr)
    loaded = unique = dy + (a.M * a.N * _size(a.saved_ptr) if a.NEEDS.correlation else 0)
    stored = dy if a.NEEDS.base else 0
    flops = 0
    if a.NEEDS.base:
        loaded, unique = loaded + chunks * a.N * _size(a.scale_ptr), unique + a.N * _size(a.scale_ptr)
    if a.SAVED_HAS_BIAS:
        loaded, unique = loaded + chunks * a.N * _size(a.base_bias_ptr), unique + a.N * _size(a.base_bias_ptr)
    if a.NEEDS.product:
        h = a.M * a.R * _size(a.h_ptr)
        loaded, unique, flops = loaded + columns * h, unique + h, 2 * a.M * a.N * a.DOT.block_r
        stored += chunks * a.N * a.R * _size(a.product_ptr)
    if a.NEEDS.correlation:
        stored += chunks * a.N * _size(a.correlation_ptr)
    if a.NEEDS.bias:
        stored += chunks * a.N * _size(a.bias_ptr)
    return Traffic(loaded, unique, stored, flops, _rate(a))


def _glu_fwd(a) -> Traffic:
    columns, chunks = a.grid
    layers = _glu_layers(a, columns=columns, blocks_m=triton.cdiv(a.M, a.CONFIG.block_m), loads_m=chunks)
    products = 2 * a.M * a.N * _size(a.gate_ptr)
    return layers._replace(
        loaded=products + layers.loaded,
        unique=products + layers.unique,
        stored=a.M * a.N * _size(a.a_ptr),
    )


def _glu_bwd(a) -> Traffic:
    columns, chunks = a.grid
    layers = _glu_layers(a, columns=columns, blocks_m=triton.cdiv(a.M, a.CONFIG.block_m), loads_m=chunks)
    streamed = 3 * a.M * a.N * _size(a.gate_ptr)
    loaded, unique, flops = layers.loaded, layers.unique, layers.flops
    stored = streamed + 2 * chunks * a.N * _size(a.correlation_ptr)
    if a.FUSED_PRODUCT:
        # The rate is that of the product in token space, where there are two.
        flops, stored = flops + 4 * a.M * a.N * a.DOT.block_r, stored + 2 * chunks * a.N * a.R * _size(a.product_ptr)
        if not a.GLU.in_token_space:
            h = a.M * _glu_h(a)
            loaded, unique = loaded + columns * h, unique + h
    rate = layers.rate if a.GLU.in_token_space else _rate_of(a.PRODUCT)
    return Traffic(streamed + loaded, streamed + unique, stored, flops, rate)


def _glu_layers(a, *, columns: int, blocks_m: int, loads_m: int) -> Traffic:
    """What makes gate's and up's outputs of their products: h, B, g and b. g and b are loaded `loads_m` times, and B
    where one block holds the rank."""
    vectors = 2 * a.N * _size(a.bias_ptr) if a.GLU.has_bias else 0
    if not a.GLU.in_token_space:
        return Traffic(loads_m * vectors, vectors, 0)
    vectors += 2 * a.N * _size(a.scale_ptr)
    h, b = a.M * _glu_h(a), 2 * a.N * a.R * _size(a.b_gate_ptr)
    h_loaded = h if a.DOT.one_block else h * a.DOT.block_r // a.R + 2 * a.M * a.R * _size(a.h_ptr)
    return Traffic(
        columns * h_loaded + (loads_m if a.DOT.one_block else blocks_m) * b + loads_m * vectors,
        h + b + vectors,
        0,
        4 * a.M * a.N * _padded_rank(a),
        _rate(a),
    )


def _glu_h(a) -> int:
    """Bytes of a token's h."""
    return a.R * _size(a.h_ptr) * (1 if a.GLU.one_h else 2)


def _rescale_bwd_finish(a) -> Traffic:
    loaded, stored = 0 if a.HOLDS_SCALE else a.N * _size(a.scale_ptr), 0
    if a.NEEDS_MAGNITUDE:
        loaded += (a.chunks * _size(a.correlation_ptr) + _size(a.norm_ptr)) * a.N
        stored += a.N * _size(a.dm_ptr)
    if a.NEEDS_BIAS:
        loaded += a.chunks * a.N * _size(a.bias_ptr)
        stored += a.N * _size(a.dbias_ptr)
    if a.NEEDS_B or (a.NEEDS_MAGNITUDE and a.FROM_BASE):
        loaded += a.product_chunks * a.N * a.R * _size(a.product_ptr)
        if a.NEEDS_MAGNITUDE and a.FROM_BASE:
            loaded += a.N * a.R * _size(a.b_ptr)
        if a.NEEDS_B:
            stored += a.N * a.R * _size(a.db_lora_ptr)
    return Traffic(loaded, loaded, stored)


def _expert_norm(a) -> Traffic:
    columns, experts = a.grid
    adapted = _adapted(a, programs_k=1, blocks_k=triton.cdiv(a.K, a.CONFIG.block_k))
    ends = columns * (2 * experts - 1) * _size(a.ends_ptr) if a.HAS_ENDS else 0
    vectors = a.N * _size(a.m_ptr)
    return adapted._replace(
        loaded=experts * (adapted.loaded + vectors) + ends,
        unique=experts * (adapted.unique + vectors),
        stored=2 * experts * a.N * _size(a.norm_ptr),
        flops=experts * adapted.flops,
    )


def _expert_rescale_fwd(a) -> Traffic:
    (tokens, _), columns = a.z_ptr.shape, triton.cdiv(a.N, a.CONFIG.block_n)
    z, h, b = tokens * a.N * _size(a.z_ptr), tokens * _size(a.h_ptr), a.N * a.R * _size(a.b_ptr)
    vectors = a.N * _size(a.scale_ptr) + (a.N * _size(a.bias_ptr) if a.HAS_BIAS else 0)
    h_columns = min(a.R, a.DOT.block_r) + (0 if a.DOT.one_block else a.R)
    return Traffic(
        _ends(a) + z + h * h_columns * columns + (b + vectors) * (a.grid[0] // columns),
        z + h * a.R + (b + vectors) * a.E,
        tokens * a.N * _size(a.y_ptr),
        2 * tokens * a.N * _padded_rank(a),
        _rate(a),
    )


def _expert_sums(a) -> Traffic:
    (tokens, _), (columns, tiles, parts) = a.dy_ptr.shape, a.grid
    dy = tokens * a.N * _size(a.dy_ptr)
    unique = dy + (tokens * a.N * _size(a.saved_ptr) if a.NEEDS.correlation else 0)
    loaded, stored, flops = _ends(a) + parts * unique, dy if a.NEEDS.base else 0, 0
    if a.NEEDS.base:
        scale = a.N * _size(a.scale_ptr)
        loaded, unique = loaded + parts * tiles * scale, unique + a.E * scale
    if a.NEEDS.product:
        h = tokens * a.R * _size(a.h_ptr)
        loaded, unique, flops = loaded + columns * h, unique + h, 2 * tokens * a.N * _padded_rank(a)
        stored += tiles * a.N * a.R * _size(a.product_ptr)
    if a.NEEDS.correlation:
        stored += tiles * a.N * _size(a.correlation_ptr)
    return Traffic(loaded, unique, stored, flops, _rate(a))


def _expert_sums_finish(a) -> Traffic:
    features, stored = a.E * a.N, 0
    loaded = _ends(a) + (features * _size(a.scale_ptr) if a.HAS_SCALE else 0)
    # Tiles behind the last one are not read: how many there are, the routing says.
    tiles = (a.product_ptr if a.NEEDS_PRODUCT or a.FROM_BASE else a.correlation_ptr).shape[0]
    if a.NEEDS_PRODUCT or a.FROM_BASE:
        loaded += tiles * a.N * a.R * _size(a.product_ptr)
        loaded += features * a.R * _size(a.b_ptr) if a.FROM_BASE else 0
        stored += features * a.R * _size(a.out_ptr) if a.NEEDS_PRODUCT else 0
    if a.NEEDS_MAGNITUDE:
        loaded += tiles * a.N * _size(a.correlation_ptr) + features * _size(a.norm_ptr)
        stored += features * _size(a.dm_ptr)
    return Traffic(loaded, loaded, stored)


def _ends(a) -> int:
    """Where each expert's tokens start and end, which every program reads."""
    return math.prod(a.grid) * (2 * a.E - 1) * _size(a.ends_ptr)


def _padded_rank(a) -> int:
    """The rank as the blocks of a product cover it."""
    return triton.cdiv(a.R, a.DOT.block_r) * a.DOT.block_r


def _size(pointer) -> int:
    return pointer.dtype.itemsize


def _rate(a) -> str:
    """Which of a GPU's rates the launch's products run at."""
    return _rate_of(a.DOT)


def _rate_of(dot) -> str:
    if dot.in_pieces:
        return "bf16x3"
    return "tf32x3" if dot.input_precision == "tf32x3" else "fp64" if str(dot.operand) == "fp64" else "bf16"


ACCOUNTS: dict[str, Callable[[SimpleNamespace], Traffic]] = {
    "_scaled_cast_kernel": _scaled_cast,
    "_weight_norm_kernel": _weight_norm,
    "_weight_norm_finish_kernel": _weight_norm_finish,
    "_merge_scale_kernel": _merge_scale,
    "_decode_kernel": _decode,
    "_expert_norm_kernel": _expert_norm,
    "_expert_rescale_fwd_kernel": _expert_rescale_fwd,
    "_expert_sums_kernel": _expert_sums,
    "_expert_sums_finish_kernel": _expert_sums_finish,
    "_glu_fwd_kernel": _glu_fwd,
    "_glu_bwd_kernel": _glu_bwd,
    "_rescale_fwd_kernel": _rescale_fwd,
    "_rescale_bwd_kernel": _rescale_bwd,
    "_rescale_bwd_finish_kernel": _rescale_bwd_finish,
}
