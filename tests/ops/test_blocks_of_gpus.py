"""Blocks depend on the GPU. The interpreter takes Hopper's; here layers, gated MLPs, experts and packed weights run in
those of other generations."""

import pytest
import torch

from dora_kernels.ops import gpus, kernels
from dora_kernels.ops.base_weights import weight_of
from dora_kernels.ops.dora_mlp import dora_mlp
from dora_kernels.ops.gpus import GPUS
from dora_kernels.ops.types import Adapted, Rounding
from tests.support import experts
from tests.support.buffers import guard_launches
from tests.support.int4 import linear_awq, linear_compressed
from tests.support.mlp import make_mlp, parts, solved
from tests.support.nf4 import linear_4bit
from tests.support.oracle import errors, make_problem, solve
from tests.support.packed import compare
from tests.support.twin_problems import factors_of
from tests.support.twins import compare as compare_dense
from tests.tolerances import TWIN

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True, params=[(8, 0), (10, 0)], ids=["sm80", "sm100"])
def gpu(request, monkeypatch):
    """A generation without, and one with, memory for products outside the registers; neither multiplies as Hopper."""
    assert GPUS[request.param][1:] != gpus.DEFAULT_GPU[1:]
    monkeypatch.setattr(gpus, "DEFAULT_GPU", GPUS[request.param])
    with guard_launches() as launches:
        yield
    assert launches


def beside_the_reference(solution, dtype):
    measured = errors(solution("triton"), solution("reference"))
    assert max(measured.values()) <= TWIN[dtype], measured


@pytest.mark.parametrize("rank", [16, 24, 40, 48, 80])
@pytest.mark.parametrize(("dtype", "space"), [(BF16, "token"), (BF16, "weight"), (FP16, "token"), (FP32, "weight")])
def test_a_layer(dtype, space, rank):
    """More output features than a block has, several blocks of inputs, and a last block that is not full."""
    problem = make_problem(21, 144, 208, rank, dtype, FP32)
    beside_the_reference(lambda impl: solve(problem, impl=impl, space=space), dtype)


@pytest.mark.parametrize("rank", [24, 48, 80])
@pytest.mark.parametrize(("dtype", "space"), [(BF16, "token"), (BF16, "weight"), (FP16, "token"), (FP32, "weight")])
def test_a_gated_mlp(dtype, space, rank):
    x, grad_y, *members = make_mlp(21, 48, 144, rank, dtype, FP32)

    def solution(impl):
        y = dora_mlp(x, *members, activation="silu", space=space, impl=impl)
        return solved(y, x, parts(*members), grad_y)

    beside_the_reference(solution, dtype)


@pytest.mark.parametrize("rank", [24, 48, 80])
def test_layers_in_one_launch(rank):
    """To the bits of each layer's own."""
    problems = [make_problem(1, features, 208, rank, BF16, FP32) for features in (144, 40)]
    layers = [Adapted(*factors_of(each), each.scaling, Rounding("dithered", 3)) for each in problems]
    merged, norm_scale = kernels.stacked_merge(layers, dtype=BF16)
    own, own_scales = zip(*(kernels.merge(*each[:5], dtype=BF16, rounding=each.rounding) for each in layers))
    assert torch.equal(merged, torch.cat(own)) and torch.equal(norm_scale.norm, torch.cat([n for n, _ in own_scales]))
    compare_dense("stacked_merge", layers, dtype=BF16)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_experts(dtype):
    stack = experts.make_stack((21, 0, 7), 144, 48, 24, dtype, FP32)
    beside_the_reference(lambda impl: experts.solve(stack, space="token", impl=impl), dtype)


PACKED = {
    "int4-narrow": lambda: linear_compressed(144, 192, 32, symmetric=False)[0],
    "int4-row": lambda: linear_compressed(144, 192, None, symmetric=False)[0],
    "awq": lambda: linear_awq(144, 256, 128)[0],
    "nf4": lambda: linear_4bit(torch.randn(144, 192)),
}


@pytest.mark.parametrize("rank", [16, 17, 80])
@pytest.mark.parametrize("layer", PACKED.values(), ids=PACKED)
def test_a_packed_weight(layer, rank):
    torch.manual_seed(0)
    weight = weight_of(layer())
    problem = make_problem(1, *weight.shape, rank, weight.dtype, FP32)
    factors = (weight, problem.lora_A, problem.lora_B, problem.magnitude, problem.scaling)
    compare("weight_norm", *factors)
    compare("merge", *factors, dtype=weight.dtype, rounding=Rounding("dithered", 7))
