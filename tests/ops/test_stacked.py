"""Several layers in one launch: each kernel against its twin, and to the bits of each layer's own launch."""

import importlib

import pytest
import torch

from dora_kernels.ops import kernels, reference
from dora_kernels.ops.types import Adapted, NormScale, Rounding
from tests.support.buffers import count_launches
from tests.support.twins import DTYPES, compare

BF16, FP32 = torch.bfloat16, torch.float32
# (features of each layer, inputs, rank)
PROBLEMS = {
    "in parts": ((9, 20), 1100, 3),
    "one program each": ((13, 29, 5), 53, 7),
    "several rank blocks": ((40, 24), 96, 70),
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
every_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
both = pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])


def make(problem, dtype=BF16, adapter_dtype=FP32, mode="dithered"):
    features, K, R = problem
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=adapter_dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        Adapted(normal(N, K, dtype=dtype), normal(R, K), normal(N, R), normal(N), 0.7, Rounding(mode, 3 + 17 * index))
        for index, N in enumerate(features)
    ]


def stack_of_A(layers, dtype):
    return torch.empty(sum(len(layer.lora_A) for layer in layers), layers[0].lora_A.shape[1], dtype=dtype)


def own_norms(ops, layers, dtype):
    """n, g, and A in `dtype`, by each layer's own launch."""
    parts = [ops.weight_norm(*layer[:5], A_dtype=dtype, rounding=layer.rounding) for layer in layers]
    return [*map(torch.cat, zip(*(norm_scale for norm_scale, _ in parts))), torch.cat([A for _, A in parts])]


@every_dtype
@every_problem
def test_the_kernels_are_their_twins(problem, dtypes):
    layers, dtype = make(problem, *dtypes), dtypes[0]
    compare("stacked_norm", layers)
    norm_scale = kernels.stacked_norm(layers)
    compare("stacked_merge", layers, dtype=dtype)
    compare("stacked_merge", layers, dtype=dtype, norm_scale=norm_scale)


@both
@pytest.mark.parametrize("mode", ["dithered", "nearest"])
@every_problem
def test_bits_are_those_of_each_layer(problem, mode, ops):
    layers = make(problem, mode=mode)
    A, again = stack_of_A(layers, BF16), stack_of_A(layers, BF16)
    norm, scale, cast = own_norms(ops, layers, BF16)
    found = ops.stacked_norm(layers, A_into=A)
    assert torch.equal(found.norm, norm) and torch.equal(found.scale, scale) and torch.equal(A, cast)
    own = torch.cat([ops.merge(*layer[:5], dtype=BF16, rounding=layer.rounding)[0] for layer in layers])
    merged, norm_scale = ops.stacked_merge(layers, dtype=BF16)
    assert torch.equal(merged, own) and all(map(torch.equal, norm_scale, found))
    merged, given = ops.stacked_merge(layers, dtype=BF16, norm_scale=norm_scale, A_into=again)
    assert torch.equal(merged, own) and torch.equal(again, cast) and given is norm_scale


@both
def test_memory_that_is_given(ops):
    layers = make(PROBLEMS["in parts"])
    found = ops.stacked_norm(layers)
    for into in (NormScale(*map(torch.empty_like, found)) for _ in range(2)):
        _, norm_scale = ops.stacked_merge(layers, dtype=BF16, into=into)
        assert norm_scale.norm is into.norm and all(map(torch.equal, into, found))
        assert all(map(torch.equal, ops.stacked_norm(layers, into=into), found))


def test_layers_whose_inputs_are_in_different_numbers_of_parts(monkeypatch):
    """As keys and values of fewer features than the queries."""
    names = ("weight_norm", "stacked_norm")
    modules = [importlib.import_module(f"dora_kernels.ops.kernels.{name}") for name in names]
    config = modules[0].weight_norm_config

    def by_features(features, *args):
        return config(features, *args)._replace(splits=1 + features // 10)

    for module in modules:
        monkeypatch.setattr(module, "weight_norm_config", by_features)
    layers = make(((21, 9, 35), 600, 3))
    expected = own_norms(kernels, layers, BF16)[:2]
    own = torch.cat([kernels.merge(*each[:5], dtype=BF16, rounding=each.rounding)[0] for each in layers])
    assert all(map(torch.equal, kernels.stacked_norm(layers), expected))
    merged, norm_scale = kernels.stacked_merge(layers, dtype=BF16)
    assert torch.equal(merged, own) and all(map(torch.equal, norm_scale, expected))


def test_norms_beyond_the_range_of_squares_in_parts():
    """Of one layer of several: in one of its parts, and small in all."""
    layers = make(PROBLEMS["in parts"], FP32)
    layers[0].weight[0, :640], layers[1].weight[2], layers[1].lora_B[2] = 1e30, 1e-30, 0
    norm, scale, _ = own_norms(kernels, layers, BF16)
    for found in (kernels.stacked_norm(layers), kernels.stacked_merge(layers, dtype=FP32)[1]):
        assert torch.equal(found.norm, norm) and torch.equal(found.scale, scale)
    assert norm[0] > 1e31 and 0 < norm[11] < 1e-28


def test_launches():
    """One, and one that adds partial sums where no merge does."""
    counted = {}
    for name in ("in parts", "one program each"):
        layers = make(PROBLEMS[name])
        with count_launches() as norms:
            norm_scale = kernels.stacked_norm(layers)
        with count_launches() as merges:
            kernels.stacked_merge(layers, dtype=BF16)
        with count_launches() as again:
            kernels.stacked_merge(layers, dtype=BF16, norm_scale=norm_scale)
        counted[name] = norms, merges, again
    norm, merge, finish = "_stacked_norm_kernel", "_stacked_merge_kernel", "_stacked_norm_finish_kernel"
    assert counted["in parts"] == ({norm: 1, finish: 1}, {norm: 1, merge: 1}, {merge: 1})
    assert counted["one program each"] == ({norm: 1}, {norm: 1, merge: 1}, {merge: 1})
