"""Dropout in both meanings: PEFT's mask from PEFT's generator state, the same one in a recomputation, none kept."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import dora_kernels as dk
from tests.support.oracle import NAMES, errors, make_problem, peft_model, solve
from tests.tolerances import SINGLE_CASE

IMPLS = pytest.mark.parametrize("impl", ["triton", "reference"])
MODES = pytest.mark.parametrize("mode", ["lora", "peft"])
RATES = pytest.mark.parametrize("rate", [0.1, 0.5], ids="p{}".format)
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
SEED = 7

DTYPES = [torch.float32, torch.bfloat16]


def solve_with(problem, rate, mode, seed=SEED, **options):
    torch.manual_seed(seed)
    return solve(problem, lora_dropout=rate, dropout_mode=mode, training=True, **options)


def collect(y, leaves, grad_y):
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, grad_y))))


@IMPLS
@BIAS
@RATES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(12,), (3, 4)], ids=["2d", "3d"])
def test_pefts_meaning_with_pefts_mask(lead, dtype, rate, bias, impl):
    problem = make_problem(12, 13, 17, 3, dtype=dtype, adapter_dtype=torch.float32, bias=bias)
    problem.x, problem.grad_y = problem.x.view(*lead, 17), problem.grad_y.view(*lead, 13)
    model = peft_model(problem, dropout=rate).train()
    layer = model.base_model.model.linear
    x = problem.x.clone().requires_grad_()
    torch.manual_seed(SEED)
    y = model(x)
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    leaves.append(layer.lora_magnitude_vector["default"].weight)
    if bias:
        leaves.append(layer.base_layer.bias)
    theirs = collect(y, leaves, problem.grad_y)
    ours = solve_with(problem, rate, "peft", impl=impl)
    for name, error in errors(ours, theirs).items():
        assert error < SINGLE_CASE[dtype], name


@IMPLS
@BIAS
@RATES
def test_dropout_on_the_lora_branch_alone(rate, bias, impl):
    problem = make_problem(12, 13, 17, 3, bias=bias)
    x, lora_A, lora_B, magnitude, *rest = leaves = problem.leaves(torch.Tensor.double)
    torch.manual_seed(SEED)
    mask = F.dropout(torch.ones_like(problem.x), rate).double()
    weight = problem.weight.double()
    norm = (weight + problem.scaling * lora_B @ lora_A).norm(dim=1).detach()
    product = F.linear(x, weight) + problem.scaling * (mask * x) @ lora_A.T @ lora_B.T
    y = magnitude / norm * product + (rest[0] if bias else 0)
    expected = collect(y, leaves, problem.grad_y.double())
    for name, error in errors(solve_with(problem, rate, "lora", impl=impl), expected).items():
        assert error < SINGLE_CASE[torch.float32], name


@MODES
@IMPLS
def test_the_generator_advances_as_one_dropout_of_x_would(impl, mode):
    problem = make_problem(12, 13, 17, 3)
    solve_with(problem, 0.5, mode, impl=impl)
    after_ours = torch.rand(4)
    torch.manual_seed(SEED)
    F.dropout(problem.x, 0.5)
    assert torch.equal(after_ours, torch.rand(4))


@MODES
@IMPLS
def test_another_seed_is_another_mask(impl, mode):
    problem = make_problem(12, 13, 17, 3)
    assert not torch.equal(
        solve_with(problem, 0.5, mode, impl=impl)["y"], solve_with(problem, 0.5, mode, seed=8, impl=impl)["y"]
    )


@MODES
@IMPLS
@pytest.mark.parametrize("options", [{"lora_dropout": 0.5, "training": False}, {"lora_dropout": 0.0, "training": True}])
def test_no_dropout_in_eval_mode_or_at_rate_zero(options, impl, mode):
    problem = make_problem(12, 13, 17, 3)
    state = torch.get_rng_state()
    solution = solve(problem, dropout_mode=mode, space="token", impl=impl, **options)
    assert torch.equal(torch.get_rng_state(), state), "the generator is not touched"
    for name, plain in solve(problem, space="token", impl=impl).items():
        assert torch.equal(solution[name], plain), name


@MODES
@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
def test_a_recomputation_drops_the_same(use_reentrant, dtype, impl, mode):
    problem = make_problem(12, 13, 17, 3, dtype=dtype, adapter_dtype=torch.float32, bias=True)

    def layer(x, lora_A, lora_B, magnitude, bias):
        return dk.dora_linear(
            x, problem.weight, lora_A, lora_B, magnitude, scaling=problem.scaling, bias=bias, impl=impl,
            lora_dropout=0.5, dropout_mode=mode, training=True,
        )  # fmt: skip

    results = []
    for run in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=use_reentrant)):
        torch.manual_seed(SEED)
        leaves = problem.leaves()
        y = run(*leaves)
        y.backward(problem.grad_y)
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for name, plain, recomputed in zip(NAMES, *results):
        assert torch.equal(plain, recomputed), name
