"""W' = g ⊙ (W + s B A) of up to three layers of one input in one launch, after one of their norms where g is not given.

To the bits of each layer's own `merge`. See `stacked_norm` for the layers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..base_weights import stored_rounding
from ..gpus import gpu_of
from ..types import Adapted, NormScale
from .base_weight import Format, adapted_block, adapted_dot
from .blocks import Matrix, addresses
from .cast import cast_strips
from .launch import ALL_REGISTERS, cdiv, either, rank_blocks
from .lora_dot import rank_block
from .merge import merge_config
from .rounding import round_to
from .stacked_norm import (
    added_splits,
    dense_weight,
    empty_stacked_norms,
    factors_of,
    launch_stacked_norm,
    layer_of,
    one_of,
    salts_of,
    stack_of,
)


@triton.jit(do_not_specialize=["salt_first", "salt_second", "salt_third"])
def _stacked_merge_kernel(
    # pointers
    w_first_ptr, w_second_ptr, w_third_ptr, a_first_ptr, a_second_ptr, a_third_ptr,
    b_first_ptr, b_second_ptr, b_third_ptr, merged_ptr, norm_ptr, scale_ptr, partial_ptr, cast_ptr,
    # sizes
    scaling: tl.float64, K, R, salt_first, salt_second, salt_third,
    # constexpr
    STACK: tl.constexpr, SPLITS: tl.constexpr, FORMAT: tl.constexpr, DOT: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_K: tl.constexpr = CONFIG.block_k
    ACC: tl.constexpr = DOT.acc
    scaling = tl.cast(scaling, ACC)
    blocks_k = tl.maximum(tl.cdiv(K, BLOCK_K), 1)
    # From the last row up: the norm has just read those, and they are in L2 still.
    layer = layer_of(tl.num_programs(0) - 1 - tl.program_id(0), blocks_k, STACK, BLOCK_N)
    w = dense_weight(one_of(layer.index, w_first_ptr, w_second_ptr, w_third_ptr), K)
    a = Matrix(one_of(layer.index, a_first_ptr, a_second_ptr, a_third_ptr), K, 1)
    b = Matrix(one_of(layer.index, b_first_ptr, b_second_ptr, b_third_ptr), R, 1)
    salt = one_of(layer.index, salt_first, salt_second, salt_third)
    if STACK.cast_mode is not None:
        cast = Matrix(cast_ptr + tl.cast(layer.index, tl.int64) * R * K, K, 1)
        cast_strips(a, cast, layer.program, layer.programs, K, R, salt, BLOCK_K, DOT, STACK.cast_mode == "dithered")
    offs_n = layer.program // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    start_k = layer.program % blocks_k * BLOCK_K
    mask_n, rows = offs_n < layer.features, layer.start + offs_n
    b_block = rank_block(b, offs_n, mask_n, 0, R, DOT)
    v = adapted_block(w, a, b, b_block, scaling, offs_n, start_k, layer.features, K, R, FORMAT, DOT, BLOCK_K)
    if SPLITS == 1:
        scale = tl.load(scale_ptr + rows, mask=mask_n, other=0.0)
    else:
        # The norm's partial sums: each program of a row of blocks adds them alike, the first one keeps n and g.
        norm, scale = added_splits(partial_ptr, rows, mask_n, layer.splits, STACK, ACC, SPLITS)
        if start_k == 0:
            tl.store(norm_ptr + rows, norm, mask=mask_n)
            tl.store(scale_ptr + rows, scale, mask=mask_n)
    offs_k = start_k + tl.arange(0, BLOCK_K)
    merged = round_to(v * scale[:, None], offs_n, offs_k, salt, merged_ptr.dtype.element_ty, STACK.dithered)
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    # The layer's own part: rows of the stack beside those of the layer would take registers that large blocks lack.
    own = Matrix(merged_ptr + tl.cast(layer.start, tl.int64) * K, K, 1)
    tl.store(addresses(own, offs_n, offs_k), merged, mask=mask)


def stacked_merge(
    layers: Sequence[Adapted],
    *,
    dtype: torch.dtype,
    norm_scale: NormScale | None = None,
    into: NormScale | None = None,
    A_into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, NormScale]:
    """Twin of `reference.stacked_merge`."""
    first, given = layers[0], norm_scale is not None
    K, R = first.weight.shape[1], first.lora_A.shape[0]
    if not given:
        norm_scale = empty_stacked_norms(layers) if into is None else into
    norm, scale = norm_scale
    stack, norm_dot, norm_config = stack_of(layers, norm.dtype)
    partial, splits = None, 1
    merged = torch.empty(len(norm), K, dtype=dtype, device=norm.device)
    if not given:
        partial = launch_stacked_norm(layers, norm_scale, stack, norm_dot, norm_config)
        splits = norm_config.splits
    gpu = gpu_of(first.weight)
    dot = adapted_dot(first.weight, first.lora_A, first.lora_B, norm.dtype, **rank_blocks(gpu, R, K % 16 == 0))
    # Adding partial sums, and ranks that are masked element by element, leave none for larger blocks.
    has_room = gpu.has_wgmma and splits == 1 and R % 16 == 0
    config = merge_config(dot, K, has_room=has_room)
    rows = sum(cdiv(each, config.block_n) for each in stack.features)
    stack = stack._replace(
        cast_mode=None if A_into is None else first.rounding.mode,
        dithered=stored_rounding(first.weight, first.rounding.mode) == "dithered",
    )
    # At least one program a row, which keeps n and g, even for K = 0.
    _stacked_merge_kernel[(rows * max(1, cdiv(K, config.block_k)),)](
        *factors_of(layers)[:9], merged, norm, scale, either(partial, scale), either(A_into, scale),
        first.scaling, K, R, *salts_of(layers),
        stack, splits, Format(), dot, config,
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    return merged, norm_scale
