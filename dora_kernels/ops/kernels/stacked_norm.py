"""n and g of up to three layers of one input in one launch, to the bits of each layer's own `weight_norm`.

A program finds the layer that its rows are of. The layers have one rank, one scaling, and factors of one dtype; their
weights are contiguous matrices. Each program squares what it would of that layer alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..gpus import gpu_of
from ..types import Adapted, NormScale
from .base_weight import Format, WeightMemory
from .blocks import Matrix
from .cast import cast_strips
from .launch import ALL_REGISTERS, TRITON_DTYPES, acc_dtype, cdiv, contiguous, either, signed32
from .lora_dot import Dot
from .weight_norm import (
    WeightNormConfig,
    norm_and_scale,
    norm_launch,
    sum_splits,
    sums_of_squares,
    weight_norm_config,
)


class Stack(NamedTuple):
    """The layers, one below the other: the features of each, 0 for no layer, and how many programs share a feature's
    inputs."""

    first: int
    second: int
    third: int
    first_splits: int
    second_splits: int
    third_splits: int
    cast_mode: str | None = None  # of A
    dithered: bool = False  # of W'

    @property
    def features(self) -> tuple[int, int, int]:
        return self[:3]

    @property
    def splits(self) -> tuple[int, int, int]:
        return self[3:6]


class Layer(NamedTuple):
    """The layer that a program works on."""

    index: Any
    features: Any
    start: Any  # of its features in the stack
    splits: Any
    program: Any  # counted from the layer's first
    programs: Any


@triton.jit
def one_of(index, first, second, third):
    """The one that belongs to layer `index`."""
    return tl.where(index == 0, first, tl.where(index == 1, second, third))


@triton.jit
def layer_of(program, blocks_k, STACK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The layer of a program. A block of features has `blocks_k` programs, or one for each of its splits if None."""
    FIRST: tl.constexpr = STACK.first
    SECOND: tl.constexpr = STACK.second
    THIRD: tl.constexpr = STACK.third
    first, second, third = tl.cdiv(FIRST, BLOCK_N), tl.cdiv(SECOND, BLOCK_N), tl.cdiv(THIRD, BLOCK_N)
    if blocks_k is None:
        first, second, third = first * STACK.first_splits, second * STACK.second_splits, third * STACK.third_splits
    else:
        first, second, third = first * blocks_k, second * blocks_k, third * blocks_k
    index = (program >= first).to(tl.int32) + (program >= first + second).to(tl.int32)
    return Layer(
        index,
        one_of(index, FIRST, SECOND, THIRD),
        one_of(index, 0, FIRST, FIRST + SECOND),
        one_of(index, STACK.first_splits, STACK.second_splits, STACK.third_splits),
        program - one_of(index, 0, first, first + second),
        one_of(index, first, second, third),
    )


@triton.jit
def dense_weight(w_ptr, K):
    """A contiguous W as `base_weight` reads it."""
    return WeightMemory(w_ptr, w_ptr, w_ptr, w_ptr, w_ptr, w_ptr, K, 1)


@triton.jit(do_not_specialize=["salt_first", "salt_second", "salt_third"])
def _stacked_norm_kernel(
    # pointers
    w_first_ptr, w_second_ptr, w_third_ptr, a_first_ptr, a_second_ptr, a_third_ptr,
    b_first_ptr, b_second_ptr, b_third_ptr, m_first_ptr, m_second_ptr, m_third_ptr,
    norm_ptr, scale_ptr, partial_ptr, cast_ptr,
    # sizes
    scaling: tl.float64, K, R, salt_first, salt_second, salt_third,
    # constexpr
    STACK: tl.constexpr, FORMAT: tl.constexpr, DOT: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_K: tl.constexpr = CONFIG.block_k
    SPLITS: tl.constexpr = CONFIG.splits
    N: tl.constexpr = STACK.first + STACK.second + STACK.third
    ACC: tl.constexpr = DOT.acc
    scaling = tl.cast(scaling, ACC)
    layer = layer_of(tl.program_id(0), None, STACK, BLOCK_N)
    w = dense_weight(one_of(layer.index, w_first_ptr, w_second_ptr, w_third_ptr), K)
    a = Matrix(one_of(layer.index, a_first_ptr, a_second_ptr, a_third_ptr), K, 1)
    b = Matrix(one_of(layer.index, b_first_ptr, b_second_ptr, b_third_ptr), R, 1)
    m_ptr = one_of(layer.index, m_first_ptr, m_second_ptr, m_third_ptr)
    blocks = layer.programs // layer.splits
    block, split = layer.program % blocks, layer.program // blocks
    if STACK.cast_mode is not None:
        if split == 0:
            cast = Matrix(cast_ptr + tl.cast(layer.index, tl.int64) * R * K, K, 1)
            salt = one_of(layer.index, salt_first, salt_second, salt_third)
            cast_strips(a, cast, block, blocks, K, R, salt, BLOCK_K, DOT, STACK.cast_mode == "dithered")
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, rows = offs_n < layer.features, layer.start + offs_n
    # As `weight_norm.split_width`.
    width = tl.cdiv(tl.cdiv(K, BLOCK_K), layer.splits) * BLOCK_K
    start = split * width
    plain, large, small = sums_of_squares(
        w, a, b, scaling, offs_n, start, tl.minimum(start + width, K), layer.features, K, R, FORMAT, DOT, CONFIG
    )
    if SPLITS == 1:
        magnitude = tl.load(m_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
        norm, scale = norm_and_scale(plain, large, small, magnitude, ACC)
        tl.store(norm_ptr + rows, norm, mask=mask_n)
        tl.store(scale_ptr + rows, scale, mask=mask_n)
    else:
        tl.store(partial_ptr + split * N + rows, plain, mask=mask_n)
        tl.store(partial_ptr + (SPLITS + split) * N + rows, large, mask=mask_n)
        tl.store(partial_ptr + (2 * SPLITS + split) * N + rows, small, mask=mask_n)
        if split == 0:
            # Beside them, for who adds them.
            magnitude = tl.load(m_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
            tl.store(partial_ptr + 3 * SPLITS * N + rows, magnitude, mask=mask_n)


@triton.jit
def added_splits(partial_ptr, rows, mask_n, splits, STACK: tl.constexpr, ACC: tl.constexpr, SPLITS: tl.constexpr):
    """n and g of these rows of the stack, of partial sums [3, SPLITS, N] and m [N] below them."""
    N: tl.constexpr = STACK.first + STACK.second + STACK.third
    plain, large, small = sum_splits(partial_ptr, rows, mask_n, N, ACC, SPLITS, rows.shape[0], splits)
    magnitude = tl.load(partial_ptr + 3 * SPLITS * N + rows, mask=mask_n, other=0.0)
    return norm_and_scale(plain, large, small, magnitude, ACC)


@triton.jit
def _stacked_norm_finish_kernel(
    # pointers
    partial_ptr, norm_ptr, scale_ptr,
    # constexpr
    STACK: tl.constexpr, ACC: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    FIRST: tl.constexpr = STACK.first
    TWO: tl.constexpr = STACK.first + STACK.second
    N: tl.constexpr = STACK.first + STACK.second + STACK.third
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    index = (rows >= FIRST).to(tl.int32) + (rows >= TWO).to(tl.int32)
    splits = one_of(index, STACK.first_splits, STACK.second_splits, STACK.third_splits)
    norm, scale = added_splits(partial_ptr, rows, rows < N, splits, STACK, ACC, SPLITS)
    tl.store(norm_ptr + rows, norm, mask=rows < N)
    tl.store(scale_ptr + rows, scale, mask=rows < N)


def three(found: Sequence) -> list:
    """Of one to three layers; the last stands for those that are not there."""
    return [*found, *[found[-1]] * (3 - len(found))]


def factors_of(layers: Sequence[Adapted]) -> list[torch.Tensor]:
    """A kernel's pointers to three weights, three A, three B and three m."""
    parts = zip(*((layer.weight, *map(contiguous, layer[1:4])) for layer in layers))
    return [tensor for part in parts for tensor in three(part)]


def salts_of(layers: Sequence[Adapted]) -> list[int]:
    return three([signed32(layer.rounding.salt) for layer in layers])


def stack_of(layers: Sequence[Adapted], acc: torch.dtype) -> tuple[Stack, Dot, WeightNormConfig]:
    """How n is summed: as of each layer alone. The configuration's splits are the most that a layer has."""
    first = layers[0]
    dot, config = norm_launch(first.weight, Format(), first.lora_A, first.lora_B, acc)
    features = [layer.weight.shape[0] for layer in layers]
    configs = [weight_norm_config(each, first.weight.shape[1], dot, gpu_of(first.weight)) for each in features]
    missing = 3 - len(layers)
    splits = [config.splits for config in configs]
    stack = Stack(*features, *[0] * missing, *splits, *[1] * missing)
    return stack, dot, config._replace(splits=max(splits))


def launch_stacked_norm(
    layers: Sequence[Adapted],
    norm_scale: NormScale,
    stack: Stack,
    dot: Dot,
    config: WeightNormConfig,
    cast_A: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Fills `norm_scale`, or returns partial sums, and m below them, that are still to be added: [3 · splits + 1, ΣN].

    `cast_A` [ΣR, K] is filled beside, where it is given.
    """
    (_, K), R, scale = layers[0].weight.shape, layers[0].lora_A.shape[0], norm_scale.scale
    shape = 3 * config.splits + 1, len(scale)
    partial = torch.empty(shape, dtype=scale.dtype, device=scale.device) if config.splits > 1 else None
    pointers = factors_of(layers)
    programs = sum(cdiv(each, config.block_n) * splits for each, splits in zip(stack.features, stack.splits))
    mode = None if cast_A is None else layers[0].rounding.mode
    _stacked_norm_kernel[(programs,)](
        *pointers, *norm_scale, either(partial, scale), either(cast_A, scale),
        layers[0].scaling, K, R, *salts_of(layers),
        Stack(*stack.features, *stack.splits, mode), Format(), dot, config,
        num_warps=config.num_warps, num_stages=config.num_stages, **ALL_REGISTERS,
    )  # fmt: skip
    return partial


def empty_stacked_norms(layers: Sequence[Adapted]) -> NormScale:
    """Memory for n and g [ΣN]."""
    dtype = acc_dtype(*(tensor.dtype for tensor in layers[0][:4]))
    norm = torch.empty(sum(len(layer.weight) for layer in layers), dtype=dtype, device=layers[0].weight.device)
    return NormScale(norm, torch.empty_like(norm))


def stacked_norm(
    layers: Sequence[Adapted], *, into: NormScale | None = None, A_into: torch.Tensor | None = None
) -> NormScale:
    """Twin of `reference.stacked_norm`."""
    norm_scale = empty_stacked_norms(layers) if into is None else into
    stack, dot, config = stack_of(layers, norm_scale.norm.dtype)
    partial = launch_stacked_norm(layers, norm_scale, stack, dot, config, A_into)
    if partial is not None:
        block_n = 128
        _stacked_norm_finish_kernel[(cdiv(len(norm_scale.norm), block_n),)](
            partial, *norm_scale, stack, TRITON_DTYPES[partial.dtype], config.splits, block_n, num_warps=4
        )
    return norm_scale
