"""Autocast: the dtypes of the output and of every gradient are those of the installed PEFT, and so are the values."""

import pytest
import torch

import dora_kernels as dk
from tests.support.oracle import NAMES, errors, make_problem, peft_model
from tests.tolerances import SINGLE_CASE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(forward, problem, leaves, autocast):
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = forward(leaves[0])
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, problem.grad_y.to(y.dtype)))))


def run_peft(problem, autocast):
    model = peft_model(problem)
    layer = model.base_model.model.linear
    leaves = [problem.x.clone().requires_grad_(), layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    leaves.append(layer.lora_magnitude_vector["default"].weight)
    if problem.bias is not None:
        leaves.append(layer.base_layer.bias)
    return run(model, problem, leaves, autocast)


def run_ours(problem, autocast, **options):
    leaves = problem.leaves()
    _, lora_A, lora_B, magnitude, *bias = leaves
    bias = bias[0] if bias else None

    def forward(x):
        return dk.dora_linear(
            x, problem.weight, lora_A, lora_B, magnitude, scaling=problem.scaling, bias=bias, **options
        )

    return run(forward, problem, leaves, autocast)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["off", "auto_bf16", "auto_fp16"])
@pytest.mark.parametrize("adapter", ["fp32", "same"], ids="adapter_{}".format)
@pytest.mark.parametrize("base", DTYPES)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_dtypes_and_values_are_pefts(impl, base, adapter, autocast, bias):
    dtype = DTYPES[base]
    problem = make_problem(
        12, 33, 40, 5, dtype=dtype, adapter_dtype=torch.float32 if adapter == "fp32" else dtype, bias=bias
    )
    theirs = run_peft(problem, autocast)
    spaces = ["token"] if torch.float16 in (autocast, dtype) else ["token", "weight"]
    coarsest = max((dtype, autocast or dtype), key=SINGLE_CASE.get)
    for space in spaces:
        ours = run_ours(problem, autocast, space=space, impl=impl)
        assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
        for name, error in errors(ours, theirs).items():
            assert error < SINGLE_CASE[coarsest], f"{name} in {space} space"


@pytest.mark.parametrize("space", ["token", "weight"])
def test_backward_may_run_under_autocast_too(space):
    problem = make_problem(12, 33, 40, 5, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    outside = run_ours(problem, torch.bfloat16, space=space, impl="triton")
    with torch.autocast("cpu", torch.bfloat16):
        inside = run_ours(problem, torch.bfloat16, space=space, impl="triton")
    for name in outside:
        assert torch.equal(outside[name], inside[name]), name


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("space", ["token", "weight"])
def test_the_backward_of_an_fp32_forward_stays_fp32_under_autocast(space, impl):
    """Where the scope of autocast holds the backward and not the forward, nothing may round to its type."""
    problem = make_problem(12, 33, 40, 5)
    gradients = []
    for inside in (False, True):
        leaves = problem.leaves()
        x, *factors = leaves
        y = dk.dora_linear(x, problem.weight, *factors, scaling=problem.scaling, space=space, impl=impl)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(y, leaves, problem.grad_y))
    for name, outside, inside in zip(NAMES[1:], *gradients):
        assert torch.equal(outside, inside), name


def test_fp64_is_left_alone_by_autocast():
    problem = make_problem(5, 6, 7, 3, dtype=torch.float64)
    assert {t.dtype for t in run_ours(problem, torch.bfloat16).values()} == {torch.float64}
