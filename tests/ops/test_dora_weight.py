"""`dora_weight` against fp64: the product rule, with the norm detached."""

import pytest
import torch

from dora_kernels.ops.dora_weight import dora_weight
from dora_kernels.ops.types import Rounding
from tests.support.oracle import errors, make_problem
from tests.tolerances import SINGLE_CASE


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_against_fp64(impl, dtype):
    problem = make_problem(4, 37, 24, 3, dtype, adapter_dtype=torch.promote_types(dtype, torch.float32))
    grad = torch.randn(37, 24, dtype=torch.float64).to(dtype)
    names, found = ("W'", "dA", "dB", "dm"), {}
    for name, convert in (("ours", lambda t: t), ("exact", torch.Tensor.double)):
        _, lora_A, lora_B, magnitude = leaves = problem.leaves(convert)
        if name == "ours":
            options = {"scaling": problem.scaling, "dtype": dtype, "rounding": Rounding("dithered", 3), "impl": impl}
            merged = dora_weight(problem.weight, lora_A, lora_B, magnitude, **options)
        else:
            adapted = problem.weight.double() + problem.scaling * lora_B @ lora_A
            merged = (magnitude / adapted.detach().norm(dim=1))[:, None] * adapted
        found[name] = dict(zip(names, (merged.detach(), *torch.autograd.grad(merged, leaves[1:], convert(grad)))))
    assert max(errors(found["ours"], found["exact"]).values()) <= SINGLE_CASE[dtype]


def test_a_row_of_zeros_gets_no_gradient():
    problem = make_problem(4, 8, 6, 2)
    problem.weight[3], problem.lora_B[3] = 0, 0
    _, lora_A, lora_B, magnitude = problem.leaves()
    merged = dora_weight(
        problem.weight, lora_A, lora_B, magnitude, scaling=2.0, dtype=torch.float32, rounding=Rounding("nearest")
    )
    assert not merged[3].any()
    gradients = torch.autograd.grad(merged.square().sum() + merged.sum(), (lora_A, lora_B, magnitude))
    assert all(gradient.isfinite().all() for gradient in gradients) and gradients[2][3] == 0
