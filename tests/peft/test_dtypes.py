"""Base, adapter and autocast dtypes of patched PEFT layers: PEFT's dtypes come out, and errors no larger than its."""

import peft
import pytest
import torch

from dora_kernels.peft import patch_peft
from tests.support.nf4 import linear_4bit
from tests.support.oracle import NAMES, errors, exact, make_problem, peft_model, relative_error, solve_peft
from tests.support.peft_models import count_fused
from tests.tolerances import UNIT_ROUNDOFF

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def solve_patched(problem, autocast, **options):
    """As `solve_peft`, with the layer patched."""
    model = peft_model(problem)
    patch_peft(model, **options)
    layer = model.base_model.model.linear
    x = problem.x.clone().requires_grad_()
    with count_fused() as calls, torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    leaves += [layer.lora_magnitude_vector["default"].weight, layer.base_layer.bias]
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, problem.grad_y.to(y.dtype))))), len(calls)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter", [torch.float32, "base"], ids=str)
@pytest.mark.parametrize("base", FLOATS, ids=str)
def test_dtypes_and_errors(base, adapter, autocast):
    problem = make_problem(24, 33, 40, 4, base, base if adapter == "base" else adapter, bias=True)
    problem.grad_y = problem.grad_y.to(autocast or base)
    expected = solve_peft(problem, autocast)
    actual, fused = solve_patched(problem, autocast, rounding="nearest")
    assert fused == 1
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
    truth = exact(problem)
    ours, pefts = errors(actual, truth), errors(expected, truth)
    # One small case, in which either may round luckily; test_numerics.py holds the engine to PEFT's error over many.
    compute = UNIT_ROUNDOFF[autocast or base]
    for name, error in ours.items():
        assert error < max(2 * pefts[name], 4 * compute), (name, error, pefts[name])


def test_a_bf16_adapter_on_an_fp32_base():
    problem = make_problem(24, 33, 40, 4, torch.float32, torch.bfloat16, bias=True)
    expected = solve_peft(problem)
    actual, fused = solve_patched(problem, None)
    assert fused == 1
    truth = exact(problem)
    for name, error in errors(actual, truth).items():
        assert actual[name].dtype == expected[name].dtype, name
        assert error <= 4 * UNIT_ROUNDOFF[torch.bfloat16], name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_4_bit_layer_answers_in_its_inputs_dtype(compute_dtype, dtype):
    """It computes in a dtype of its own, as bitsandbytes' layer does."""
    model = peft.get_peft_model(
        torch.nn.ModuleDict({"linear": linear_4bit(torch.randn(48, 64), compute_dtype=compute_dtype)}),
        peft.LoraConfig(r=4, use_dora=True, target_modules=["linear"]),
    )
    layer, x = model.base_model.model["linear"], torch.randn(5, 64, dtype=dtype)
    expected = layer(x)
    patch_peft(model)
    with count_fused() as calls:
        actual = layer(x)
    assert len(calls) == 1 and actual.dtype == expected.dtype == dtype
    assert relative_error(actual, expected) <= 8 * UNIT_ROUNDOFF[torch.bfloat16]


@pytest.mark.parametrize("where", ["no_autocast", "float64"])
def test_inputs_that_peft_refuses_are_refused_by_peft(where):
    problem = make_problem(4, 6, 5, 2, torch.float32)
    model = peft_model(problem)
    x = problem.x.double() if where == "float64" else problem.x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "float64"):
        with pytest.raises(RuntimeError) as expected:
            model(x)
        patch_peft(model)
        with pytest.raises(RuntimeError) as actual:
            model(x)
    assert str(actual.value) == str(expected.value)
