"""Every kernel against its reference twin, between guard bands: odd shapes, all ranks, all layouts, all dtype mixes."""

import pytest
import torch

from dora_kernels.ops import kernels, reference
from dora_kernels.ops.gpus import DEFAULT_GPU
from dora_kernels.ops.kernels.launch import dot_of
from dora_kernels.ops.kernels.weight_norm import weight_norm_config
from dora_kernels.ops.types import NEAREST, NormScale, Rounding
from tests.support.buffers import LAYOUTS, count_launches
from tests.support.oracle import make_problem
from tests.support.twin_problems import (
    ALL_GRADIENTS,
    ROUNDED,
    every_dtype,
    every_shape,
    factors_of,
    norm_scale_of,
    token_space,
)
from tests.support.twins import compare


@every_dtype
@every_shape
def test_weight_norm(shape, dtypes):
    problem = make_problem(*shape, *dtypes)
    compare("weight_norm", *factors_of(problem), problem.scaling)


@pytest.mark.parametrize("rank", [1, 2, 3, 15, 17, 31, 33, 64, 100, 384, 1000, 1024])
def test_weight_norm_at_any_rank(rank):
    problem = make_problem(1, 17, 23, rank, torch.bfloat16, torch.float32)
    compare("weight_norm", *factors_of(problem), problem.scaling)


def test_weight_norm_in_splits():
    """Few output features and many inputs: several programs share a feature, and a second launch adds them up."""
    problem = make_problem(1, 5, 1100, 3)
    dot = dot_of(3, torch.float32, torch.float32, acc=torch.float32)
    assert weight_norm_config(5, 1100, dot, DEFAULT_GPU).splits == 2
    with count_launches() as launches:
        compare("weight_norm", *factors_of(problem), problem.scaling)
    assert launches == {"_weight_norm_kernel": 1, "_weight_norm_finish_kernel": 1}


@every_dtype
@every_shape
def test_merge(shape, dtypes):
    problem = make_problem(*shape, *dtypes)
    with count_launches() as launches:
        compare("merge", *factors_of(problem), problem.scaling, dtype=dtypes[0], **ROUNDED)
    assert launches == {"_weight_norm_kernel": 1, "_merge_scale_kernel": 1}


def test_merge_in_splits():
    """The second launch adds up the norm's partial sums, and keeps n and g for the backward."""
    problem = make_problem(1, 5, 1100, 3, torch.bfloat16, torch.float32)
    with count_launches() as launches:
        compare("merge", *factors_of(problem), problem.scaling, dtype=torch.bfloat16, **ROUNDED)
    assert launches == {"_weight_norm_kernel": 1, "_merge_scale_kernel": 1}


@every_dtype
@every_shape
def test_merge_with_the_scale_given(shape, dtypes):
    problem = make_problem(*shape, *dtypes)
    given = {"norm_scale": norm_scale_of(problem)}
    factors = (problem.weight, problem.lora_A, problem.lora_B, None)
    compare("merge", *factors, problem.scaling, dtype=dtypes[0], **given, **ROUNDED)


@pytest.mark.parametrize("given", [False, True], ids=["with-the-norm", "g-given"])
@pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])
def test_a_merge_casts_A_beside(ops, given):
    problem = make_problem(1, 29, 333, 37, torch.bfloat16, torch.float32)
    norm_scale, A = norm_scale_of(problem) if given else None, torch.empty(37, 333, dtype=torch.bfloat16)
    ops.merge(*factors_of(problem), problem.scaling, dtype=torch.bfloat16, norm_scale=norm_scale, A_into=A, **ROUNDED)
    assert torch.equal(A, ops.scaled_cast(problem.lora_A, torch.bfloat16, **ROUNDED))


@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
def test_merge_from_fp32_into_16_bits(rounding):
    """Autocast: an fp32 base, W' in the autocast dtype."""
    problem = make_problem(1, 29, 53, 7)
    for dtype in (torch.bfloat16, torch.float16):
        compare("merge", *factors_of(problem), problem.scaling, dtype=dtype, rounding=Rounding(rounding, 3))


@pytest.mark.parametrize("splits", [False, True], ids=["whole", "splits"])
def test_the_norm_casts_A_beside(splits):
    problem = make_problem(1, 5 if splits else 300, 1100 if splits else 300, 37)
    options = ROUNDED | {"A_dtype": torch.bfloat16}
    ours, twin = (ops.weight_norm(*factors_of(problem), problem.scaling, **options)[1] for ops in (kernels, reference))
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, twin)


@pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])
def test_a_norm_that_is_given_is_returned(ops):
    problem = make_problem(1, 29, 53, 7)
    arguments = (problem.weight, problem.lora_A, problem.lora_B, None, problem.scaling)
    given = norm_scale_of(problem)
    assert ops.merge(*arguments, dtype=torch.float32, norm_scale=given, rounding=NEAREST)[1] is given


@pytest.mark.parametrize("options", [{}, {"scaling": 0.37}, {"scaling": 0.37, "scale": torch.randn(19)}], ids=len)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_scaled_cast(dtype, options):
    compare("scaled_cast", torch.randn(19, 133), dtype, **options, **ROUNDED)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Any strides: weights, adapters and incoming gradients need not be contiguous."""
    problem = make_problem(18, 14, 22, 6, torch.bfloat16, torch.float32)
    lay_out = LAYOUTS[layout]
    factors = [lay_out(t) for t in (problem.weight, problem.lora_A, problem.lora_B)]
    magnitude = lay_out(problem.magnitude[:, None])[:, 0]
    compare("weight_norm", *factors, magnitude, problem.scaling)
    compare("merge", *factors, magnitude, problem.scaling, dtype=torch.bfloat16, **ROUNDED)
    norm_scale, _ = reference.weight_norm(*factors, magnitude, problem.scaling)
    base_out, h = lay_out(problem.grad_y.flip(0)), lay_out(torch.randn(18, 6, dtype=torch.bfloat16))
    compare("rescale_fwd", base_out, h, factors[2], norm_scale.scale, None, problem.scaling, in_place=False, **ROUNDED)
    needs = ALL_GRADIENTS
    arguments = (lay_out(problem.grad_y), base_out, h, factors[2], norm_scale, problem.scaling)
    compare("rescale_bwd", *arguments, saved_is="base", **needs, **ROUNDED)
    compare("scaled_cast", factors[1], torch.bfloat16, **ROUNDED)


def test_no_tokens():
    problem = make_problem(0, 5, 7, 3, torch.bfloat16, torch.float32)
    base_out, h, lora_B, scale = token_space(problem)
    assert kernels.rescale_fwd(base_out, h, lora_B, scale, None, 1.0, in_place=True, **ROUNDED).shape == (0, 5)
    needs = ALL_GRADIENTS
    grads = kernels.rescale_bwd(
        problem.grad_y, base_out, h, lora_B, norm_scale_of(problem), 1.0, saved_is="output", **needs, **ROUNDED
    )
    assert [grad.shape for grad in grads] == [(5,), (5, 3), (5,), (0, 5)]
    assert all(grad.eq(0).all() for grad in grads)


def test_results_go_where_the_caller_has_memory():
    """Between guard bands: rows of W', n, g and A in the middle of larger tensors."""
    problem = make_problem(1, 20, 33, 7, torch.bfloat16, torch.float32)
    for ops in (kernels, reference):
        (norm, scale), cast_A = ops.weight_norm(
            *factors_of(problem), problem.scaling, A_dtype=torch.bfloat16, **ROUNDED
        )
        merged, _ = ops.merge(*factors_of(problem), problem.scaling, dtype=torch.bfloat16, **ROUNDED)
        stack, A = torch.full((60, 33), 7.0, dtype=torch.bfloat16), torch.full((21, 33), 7.0, dtype=torch.bfloat16)
        norms = NormScale(torch.full((60,), 7.0), torch.full((60,), 7.0))
        own = slice(20, 40)
        into = NormScale(norms.norm[own], norms.scale[own])
        options = {"into": into, "A_into": A[7:14], "A_dtype": torch.bfloat16}
        ops.weight_norm(*factors_of(problem), problem.scaling, **options, **ROUNDED)
        found = (*norms, A)
        assert all(torch.equal(t[at], e) for t, at, e in zip(found, (own, own, slice(7, 14)), (norm, scale, cast_A)))
        for part in into:
            part.fill_(7.0)
        ops.merge(*factors_of(problem), problem.scaling, dtype=torch.bfloat16, out=stack[own], into=into, **ROUNDED)
        assert torch.equal(stack[own], merged) and torch.equal(norms.norm[own], norm)
        assert all((t[:7] == 7).all() and (t[-7:] == 7).all() for t in (stack, *found))
