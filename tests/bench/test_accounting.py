"""The kernels' own accounting equals what they load and store under the interpreter, byte for byte."""

import importlib

import pytest
import torch

import dora_kernels as dk
from bench.counting import accounting
from dora_kernels.ops import dispatch, kernels
from dora_kernels.ops.base_weights import weight_of
from dora_kernels.ops.types import NEAREST, Adapted, GluFactors, KeptNorm, Rounding
from tests.bench.test_offline import ROOT
from tests.support.experts import make_stack
from tests.support.experts import solve as solve_experts
from tests.support.fp4 import linear_fp4
from tests.support.int4 import linear_awq, linear_compressed, linear_gptq
from tests.support.loads_and_stores import count_bytes
from tests.support.nf4 import linear_4bit
from tests.support.oracle import make_problem, solve

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# Sizes that no block divides, and ranks on both sides of every block: one, several, and those that are not fused.
SHAPES = {"odd": (77, 101, 83, 5), "two rank blocks": (33, 70, 130, 40), "whole blocks": (64, 128, 128, 16)}
NF4_SHAPES = {"whole blocks": (9, 70, 192, 5), "straddling": (9, 70, 83, 5), "several rank blocks": (9, 70, 128, 40)}
DTYPES = {"bf16/fp32": (BF16, FP32), "bf16/bf16": (BF16, BF16), "fp32/fp32": (FP32, FP32), "fp64/fp64": (FP64, FP64)}


def held_to_the_interpreter(launches):
    """Asserts for every launch; returns the kernels' names."""
    for launch in launches:
        account = accounting.of_launch(launch.kernel, launch.grid, launch.args)
        name = launch.kernel.fn.__name__
        assert (account.loaded, account.stored) == (launch.loaded, launch.stored), (name, launch.grid)
        assert account.unique <= account.loaded
    return {launch.kernel.fn.__name__ for launch in launches}


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_layer(shape, dtypes, space, bias):
    problem = make_problem(*shape, dtype=dtypes[0], adapter_dtype=dtypes[1], bias=bias)
    with count_bytes() as launches:
        solve(problem, space=space, impl="triton")
    assert len(held_to_the_interpreter(launches)) >= 3


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_kept_norm_reads_no_weight(shape, dtypes):
    """While A, B and m hold the same bits: these, their copies, n and g, and each program's 256 answers."""
    _, N, K, R = shape
    weight = torch.randn(N, K).to(dtypes[0])
    factors = [torch.randn(*size).to(dtypes[1]) for size in ((R, K), (N, R), (N,))]
    norm_scale, _ = kernels.weight_norm(weight, *factors, 0.5)
    kept = KeptNorm(*(factor.clone() for factor in factors), norm_scale)
    with count_bytes() as launches:
        kernels.kept_norm(weight, *factors, 0.5, kept)
    assert held_to_the_interpreter(launches) == {"_compare_factors_kernel", "_kept_norm_kernel"}
    known = sum(2 * part.nbytes for part in (*factors, norm_scale.norm))
    assert sum(launch.loaded for launch in launches) == known + 4 * 256 * launches[-1].grid[0]


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_a_kept_weight_is_not_read(dtypes):
    """While A, B and m hold the same bits."""
    weight, A, B, m = (torch.randn(size).to(dtypes[0]) for size in ((77, 83), (5, 83), (77, 5), (77,)))
    norm_scale, _ = kernels.weight_norm(weight, A, B, m, 0.5)
    changed = torch.zeros(256, dtype=torch.int32)
    with count_bytes() as launches:
        kernels.kept_merge(
            weight, A, B, 0.5,
            rounding=Rounding("dithered"), norm_scale=norm_scale, changed=changed, out=torch.empty_like(weight),
        )  # fmt: skip
    assert held_to_the_interpreter(launches) == {"_kept_merge_kernel"}
    assert (launches[0].loaded, launches[0].stored) == (changed.nbytes * launches[0].grid[0], 0)


@pytest.mark.parametrize("mode", ["lora", "peft"])
def test_dropout(mode):
    problem = make_problem(77, 101, 83, 5, dtype=BF16, adapter_dtype=FP32, bias=True)
    with count_bytes() as launches:
        solve(problem, space="token", impl="triton", training=True, lora_dropout=0.3, dropout_mode=mode)
    held_to_the_interpreter(launches)


@pytest.mark.parametrize("one_h", [False, True], ids=["two_h", "one_h"])
@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(77, 101, 5), (33, 70, 40), (300, 64, 16)], ids=str)
def test_a_gated_mlp(shape, dtypes, space, one_h):
    (tokens, features, rank), (dtype, adapter_dtype) = shape, dtypes
    grad_a, gate, up = torch.randn(3, tokens, features).to(dtype)
    norm = scale = torch.ones(2 * features, dtype=torch.promote_types(FP32, dtype))
    h, lora_B = torch.randn(tokens, rank if one_h else 2 * rank).to(dtype), torch.randn(2, features, rank)
    factors = GluFactors(h, tuple(lora_B.to(adapter_dtype)), scale, 2.0)
    bias = torch.randn(2 * features).to(dtype) if one_h else None
    with count_bytes() as launches:
        kernels.glu_fwd(gate, up, factors if space == "token" else None, bias, activation="silu")
        options = {"space": space, "activation": "silu", "dtype": adapter_dtype, "roundings": (NEAREST,) * 2}
        kernels.glu_bwd(grad_a, gate, up, factors, bias, norm, **options)
    assert len(held_to_the_interpreter(launches)) == 3


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("features", "K", "rank"), [((5, 9), 1100, 3), ((40, 33, 7), 130, 40)], ids=str)
def test_several_layers_in_one_launch(features, K, rank, dtypes):
    def layer(N):
        factors = [torch.randn(*size).to(dtypes[1]) for size in ((rank, K), (N, rank), (N,))]
        return Adapted(torch.randn(N, K).to(dtypes[0]), *factors, 2.0, NEAREST)

    layers = [*map(layer, features)]
    A = torch.empty(len(features) * rank, K, dtype=dtypes[0])
    with count_bytes() as launches:
        norm_scale = kernels.stacked_norm(layers, A_into=A)
        kernels.stacked_merge(layers, dtype=dtypes[0])
        kernels.stacked_merge(layers, dtype=dtypes[0], norm_scale=norm_scale, A_into=A)
    names = held_to_the_interpreter(launches)
    assert len(launches) == 4 + ("_stacked_norm_finish_kernel" in names)


@pytest.mark.parametrize(
    ("rank", "dtypes", "bias"), list(zip((5, 40, 5, 40), DTYPES.values(), (True, False, False, True))), ids=DTYPES
)
def test_experts(rank, dtypes, bias):
    """Of which each fills its tiles but one token: there are as many tiles as there may be."""
    stack = make_stack((1, 1), 37, 45, rank, *dtypes, bias=bias)
    with count_bytes() as launches:
        solve_experts(stack, space="token", impl="triton")
    names = held_to_the_interpreter(launches)
    assert len([name for name in names if "_expert_" in name]) == 4


@pytest.mark.parametrize(("rank", "dtypes"), list(zip((5, 40, 5, 40), DTYPES.values())), ids=DTYPES)
def test_gate_times_up_of_experts(rank, dtypes):
    stack = make_stack((1, 1), 74, 45, rank, *dtypes)
    with count_bytes() as launches:
        solve_experts(stack, space="token", impl="triton", activation="silu")
    names = held_to_the_interpreter(launches)
    assert len([name for name in names if "_expert_glu_" in name]) == 2


@pytest.mark.parametrize("trained", ["x", "lora_B", "magnitude"])
def test_one_gradient_alone(trained):
    """Each switch of the backward pass by itself."""
    problem = make_problem(77, 101, 83, 5, dtype=BF16, adapter_dtype=FP32)
    leaves = {name: getattr(problem, name).clone() for name in ("x", "lora_A", "lora_B", "magnitude")}
    leaves[trained].requires_grad_()
    with count_bytes() as launches:
        y = dk.dora_linear(weight=problem.weight, scaling=2.0, space="token", impl="triton", **leaves)
        y.backward(problem.grad_y)
    held_to_the_interpreter(launches)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", NF4_SHAPES.values(), ids=NF4_SHAPES)
@pytest.mark.parametrize(
    "options", [{"space": "weight"}, {"training": True, "lora_dropout": 0.3}], ids=["weight", "token"]
)
def test_a_4_bit_layer(shape, nested, options):
    problem = make_problem(*shape, dtype=BF16, adapter_dtype=FP32)
    problem.weight = linear_4bit(problem.weight, nested=nested).weight
    with count_bytes() as launches:
        solve(problem, impl="triton", **options)
    assert len(held_to_the_interpreter(launches)) >= 3


@pytest.mark.parametrize(
    "layer",
    [
        lambda: linear_compressed(70, 192, 64),
        lambda: linear_compressed(70, 83, None, symmetric=False),
        lambda: linear_gptq(70, 192, 16, act_order=True),
        lambda: linear_awq(72, 192, 48),
        lambda: linear_fp4("nvfp4", 70, 192),
        lambda: linear_fp4("mxfp4", 70, 96),
    ],
    ids=["symmetric", "one for each row", "act-order", "AWQ", "NVFP4", "MXFP4"],
)
def test_a_layer_of_four_bits(layer):
    weight = weight_of(layer()[0])
    problem = make_problem(9, *weight.shape, 5, dtype=BF16, adapter_dtype=FP32)
    problem.weight = weight
    with count_bytes() as launches:
        solve(problem, impl="triton", space="weight")
        dispatch.dense_weight(weight, BF16, "triton")
    assert "_decode_kernel" in held_to_the_interpreter(launches)


@pytest.mark.parametrize("rank", [5, 40], ids="r{}".format)
@pytest.mark.parametrize("splits", [1, 3], ids=["whole rows", "split rows"])
def test_every_form_of_norm_and_merge(monkeypatch, rank, splits):
    """Small shapes choose one form; here each is forced."""
    # By name: the package has a function of the same name.
    module = importlib.import_module("dora_kernels.ops.kernels.weight_norm")
    config = module.weight_norm_config

    def split(*args):
        return config(*args)._replace(splits=splits)

    monkeypatch.setattr(module, "weight_norm_config", split)
    problem = make_problem(9, 70, 600, rank, dtype=BF16, adapter_dtype=FP32)
    with count_bytes() as launches:
        for space in ("token", "weight"):
            solve(problem, space=space, impl="triton")
    names = held_to_the_interpreter(launches)
    assert ("_weight_norm_finish_kernel" in names) == (splits > 1)


def test_every_kernel_has_an_account():
    text = "".join(path.read_text() for path in (ROOT / "dora_kernels" / "ops" / "kernels").glob("*.py"))
    kernels = {word.split("(")[0] for word in text.split("def ")[1:] if word.split("(")[0].endswith("_kernel")}
    assert set(accounting.ACCOUNTS) == kernels
