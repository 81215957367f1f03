"""Every kernel against its reference twin, between guard bands: odd shapes, all ranks, all layouts, all dtype mixes."""

import pytest
import torch

from dora_kernels.ops import kernels, reference
from dora_kernels.ops.gpus import DEFAULT_GPU
from dora_kernels.ops.kernels.launch import dot_of
from dora_kernels.ops.kernels.rescale_bwd import rescale_bwd_config
from dora_kernels.ops.kernels.weight_norm import weight_norm_config
from dora_kernels.ops.types import NEAREST, NormScale, Rounding
from tests.support.buffers import LAYOUTS, count_launches
from tests.support.oracle import make_problem
from tests.support.twins import DTYPES, compare

SHAPES = {
    "small": (5, 4, 3, 1),
    "odd": (37, 29, 53, 7),
    "multiples": (32, 64, 128, 16),
    "rank-24": (9, 20, 21, 24),
    "rank-40": (19, 33, 21, 40),
}
ALL_GRADIENTS = {
    "magnitude_dtype": torch.float32,
    "B_dtype": torch.float32,
    "bias_dtype": torch.float32,
    "needs_base": True,
}
ROUNDED = {"rounding": Rounding("dithered", 0xC0FFEE42)}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)


def _factors(problem):
    return problem.weight, problem.lora_A, problem.lora_B, problem.magnitude


@every_dtype
@every_shape
def test_weight_norm(shape, dtypes):
    problem = make_problem(*shape, *dtypes)
    compare("weight_norm", *_factors(problem), problem.scaling)


@pytest.mark.parametrize("rank", [1, 2, 3, 15, 17, 31, 33, 64, 100, 384, 1000, 1024])
def test_weight_norm_at_any_rank(rank):
    problem = make_problem(1, 17, 23, rank, torch.bfloat16, torch.float32)
    compare("weight_norm", *_factors(problem), problem.scaling)


def test_weight_norm_in_splits():
    """Few output features and many inputs: several programs share a feature, and a second launch adds them up."""
    problem = make_problem(1, 5, 1100, 3)
    dot = dot_of(3, torch.float32, torch.float32, acc=torch.float32)
    assert weight_norm_config(5, 1100, dot, DEFAULT_GPU).splits == 2
    with count_launches() as launches:
        compare("weight_norm", *_factors(problem), problem.scaling)
    assert launches == {"_weight_norm_kernel": 1, "_weight_norm_finish_kernel": 1}


@every_dtype
@every_shape
def test_merge(shape, dtypes):
    problem = make_problem(*shape, *dtypes)
    with count_launches() as launches:
        compare("merge", *_factors(problem), problem.scaling, dtype=dtypes[0], **ROUNDED)
    assert launches == {"_weight_norm_kernel": 1, "_merge_scale_kernel": 1}


def test_merge_in_splits():
    """The second launch adds up the norm's partial sums, and keeps n and g for the backward."""
    problem = make_problem(1, 5, 1100, 3, torch.bfloat16, torch.float32)
    with count_launches() as launches:
        compare("merge", *_factors(problem), problem.scaling, dtype=torch.bfloat16, **ROUNDED)
    assert launches == {"_weight_norm_kernel": 1, "_merge_scale_kernel": 1}


@every_dtype
@every_shape
def test_merge_with_the_scale_given(shape, dtypes):
    problem = make_problem(*shape, *dtypes)
    given = {"norm_scale": _norm_scale(problem)}
    factors = (problem.weight, problem.lora_A, problem.lora_B, None)
    compare("merge", *factors, problem.scaling, dtype=dtypes[0], **given, **ROUNDED)


@pytest.mark.parametrize("given", [False, True], ids=["with-the-norm", "g-given"])
@pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])
def test_a_merge_casts_A_beside(ops, given):
    problem = make_problem(1, 29, 333, 37, torch.bfloat16, torch.float32)
    norm_scale, A = _norm_scale(problem) if given else None, torch.empty(37, 333, dtype=torch.bfloat16)
    ops.merge(*_factors(problem), problem.scaling, dtype=torch.bfloat16, norm_scale=norm_scale, A_into=A, **ROUNDED)
    assert torch.equal(A, ops.scaled_cast(problem.lora_A, torch.bfloat16, **ROUNDED))


@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
def test_merge_from_fp32_into_16_bits(rounding):
    """Autocast: an fp32 base, W' in the autocast dtype."""
    problem = make_problem(1, 29, 53, 7)
    for dtype in (torch.bfloat16, torch.float16):
        compare("merge", *_factors(problem), problem.scaling, dtype=dtype, rounding=Rounding(rounding, 3))


def _norm_scale(problem):
    return reference.weight_norm(*_factors(problem), problem.scaling)[0]


def _token_space(problem):
    h = problem.x @ problem.lora_A.to(problem.x.dtype).T
    return problem.x @ problem.weight.T, h, problem.lora_B, _norm_scale(problem).scale


@pytest.mark.parametrize("undropped", [False, True], ids=["plain", "peft-dropout"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@every_dtype
@every_shape
def test_rescale_fwd(shape, dtypes, bias, undropped):
    problem = make_problem(*shape, *dtypes, bias=bias)
    arguments = (*_token_space(problem), problem.bias, problem.scaling)
    other = torch.randn_like(arguments[0]) if undropped else None
    compare("rescale_fwd", *arguments, undropped=other, in_place=False, **ROUNDED)


@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in-place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_shape
def test_rescale_fwd_of_a_product_that_holds_the_bias(shape, dtype, in_place):
    problem = make_problem(*shape, dtype, bias=True)
    base_out, *rest = _token_space(problem)
    own = {"written": (0,) if in_place else (), "in_place": in_place, "base_bias": problem.bias}
    compare("rescale_fwd", base_out + problem.bias, *rest, None, problem.scaling, **own, **ROUNDED)


def test_rescale_fwd_in_place():
    problem = make_problem(37, 29, 53, 7, torch.bfloat16, torch.float32)
    arguments = (*_token_space(problem), None, problem.scaling)
    compare("rescale_fwd", *arguments, written=(0,), in_place=True, **ROUNDED)
    base_out = arguments[0].clone()
    assert kernels.rescale_fwd(base_out, *arguments[1:], in_place=True, **ROUNDED).data_ptr() == base_out.data_ptr()


@pytest.mark.parametrize("saved_is", ["output", "base"])
@every_dtype
@every_shape
def test_rescale_bwd(shape, dtypes, saved_is):
    problem = make_problem(*shape, *dtypes)
    base_out, h, lora_B, _ = _token_space(problem)
    needs = ALL_GRADIENTS
    arguments = (problem.grad_y, base_out, h, lora_B, _norm_scale(problem), problem.scaling)
    own = {"magnitude_dtype": dtypes[1], "B_dtype": dtypes[1], "bias_dtype": dtypes[0]}
    compare("rescale_bwd", *arguments, saved_is=saved_is, **needs | own, **ROUNDED)


@pytest.mark.parametrize("needed", ["magnitude_dtype", "B_dtype", "bias_dtype", "needs_base"])
@pytest.mark.parametrize("rank", [7, 40])
@pytest.mark.parametrize("saved_is", ["output", "base"])
def test_rescale_bwd_alone(needed, rank, saved_is):
    """Each gradient without the others; what is not needed is not read."""
    problem = make_problem(37, 29, 53, rank)
    base_out, h, lora_B, _ = _token_space(problem)
    needs = dict.fromkeys(ALL_GRADIENTS) | {"needs_base": False, needed: ALL_GRADIENTS[needed]}
    saved = base_out if needed == "magnitude_dtype" else None
    h = h if needed == "B_dtype" or (needed == "magnitude_dtype" and saved_is == "base") else None
    arguments = (problem.grad_y, saved, h, lora_B, _norm_scale(problem), problem.scaling)
    compare("rescale_bwd", *arguments, saved_is=saved_is, scale_shift=1.0, **needs, **ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_shape
def test_rescale_bwd_of_a_product_that_holds_the_bias(shape, dtype):
    problem = make_problem(*shape, dtype, bias=True)
    base_out, h, lora_B, _ = _token_space(problem)
    arguments = (problem.grad_y, base_out + problem.bias, h, lora_B, _norm_scale(problem), problem.scaling)
    own = dict.fromkeys(("magnitude_dtype", "B_dtype", "bias_dtype"), dtype)
    compare("rescale_bwd", *arguments, saved_is="base", base_bias=problem.bias, **ALL_GRADIENTS | own, **ROUNDED)


@pytest.mark.parametrize("has_g", [True, False], ids=["with-g", "without-g"])
@pytest.mark.parametrize("needed", ["magnitude_dtype", "B_dtype", "bias_dtype"])
@pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])
def test_rescale_bwd_casts_B_beside(ops, needed, has_g):
    """To the bits of its own launch, whichever sum it is beside."""
    problem = make_problem(9, 37, 53, 40, torch.bfloat16, torch.float32)
    base_out, h, lora_B, _ = _token_space(problem)
    norm_scale, B = _norm_scale(problem), torch.empty(37, 40, dtype=torch.bfloat16)
    needs = dict.fromkeys(ALL_GRADIENTS) | {"needs_base": False, needed: torch.float32}
    arguments = (problem.grad_y, base_out, h, lora_B, norm_scale, problem.scaling)
    ops.rescale_bwd(*arguments, saved_is="output", B_into=B, B_has_g=has_g, **needs, **ROUNDED)
    scale = norm_scale.scale if has_g else None
    assert torch.equal(B, ops.scaled_cast(lora_B, B.dtype, scale=scale, scaling=problem.scaling, **ROUNDED))


@pytest.mark.parametrize("rank", [7, 40])
def test_rescale_bwd_in_chunks(rank):
    """Enough tokens that several programs share an output feature."""
    problem = make_problem(700, 9, 13, rank, torch.bfloat16, torch.float32)
    base_out, h, lora_B, _ = _token_space(problem)
    needs = ALL_GRADIENTS
    arguments = (problem.grad_y, base_out, h, lora_B, _norm_scale(problem), problem.scaling)
    compare("rescale_bwd", *arguments, saved_is="base", **needs, **ROUNDED)


@pytest.mark.parametrize("out_features", [1024, 4096, 14336, 28672])
def test_rescale_bwd_is_one_wave(out_features):
    """Four programs run at once on each of 132 multiprocessors: none waits for another, and most places are taken."""
    config = rescale_bwd_config(8192, out_features, 4, 2)
    assert 3 * 132 < -(-out_features // config.block_n) * config.chunks <= 4 * 132


def test_rescale_bwd_past_two_to_the_31(tmp_path):
    """The second block of tokens begins 2³¹ elements behind the first, in a file with holes."""
    M, N, stride, first = 34, 5, 2**26, 2**31
    file = torch.from_file(str(tmp_path / "dy"), shared=True, size=first + M * stride, dtype=torch.bfloat16)
    problem = make_problem(M, N, 3, 2, torch.bfloat16, torch.float32)
    far = file.as_strided((M, N), (stride, 1), first).copy_(problem.grad_y)
    needs = dict.fromkeys(ALL_GRADIENTS) | {"needs_base": True, "bias_dtype": torch.float32}
    near, far = (
        kernels.rescale_bwd(
            grad_y, None, None, problem.lora_B, _norm_scale(problem), 1.0, saved_is="output", **needs, **ROUNDED
        )[2:]
        for grad_y in (problem.grad_y, far)
    )
    assert all(torch.equal(*pair) for pair in zip(near, far))


@pytest.mark.parametrize("splits", [False, True], ids=["whole", "splits"])
def test_the_norm_casts_A_beside(splits):
    problem = make_problem(1, 5 if splits else 300, 1100 if splits else 300, 37)
    options = ROUNDED | {"A_dtype": torch.bfloat16}
    ours, twin = (ops.weight_norm(*_factors(problem), problem.scaling, **options)[1] for ops in (kernels, reference))
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, twin)


@pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])
def test_a_norm_that_is_given_is_returned(ops):
    problem = make_problem(1, 29, 53, 7)
    arguments = (problem.weight, problem.lora_A, problem.lora_B, None, problem.scaling)
    given = _norm_scale(problem)
    assert ops.merge(*arguments, dtype=torch.float32, norm_scale=given, rounding=NEAREST)[1] is given


@pytest.mark.parametrize("scaled", [False, True], ids=["cast", "scaled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_scaled_cast(dtype, scaled):
    factor, scale = torch.randn(19, 133), torch.randn(19)
    options = {"scale": scale, "scaling": 0.37} if scaled else {}
    compare("scaled_cast", factor, dtype, **options, **ROUNDED)


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
    base_out, h, lora_B, scale = _token_space(problem)
    assert kernels.rescale_fwd(base_out, h, lora_B, scale, None, 1.0, in_place=True, **ROUNDED).shape == (0, 5)
    needs = ALL_GRADIENTS
    grads = kernels.rescale_bwd(
        problem.grad_y, base_out, h, lora_B, _norm_scale(problem), 1.0, saved_is="output", **needs, **ROUNDED
    )
    assert [grad.shape for grad in grads] == [(5,), (5, 3), (5,), (0, 5)]
    assert all(grad.eq(0).all() for grad in grads)


def test_an_fp32_factor_is_not_cut_to_16_bits():
    """z = −1 and h Bᵀ = 1 + 2⁻¹⁰ cancel to what a bf16 B would not hold."""
    ones, lora_B = torch.ones(37, 1, dtype=torch.bfloat16), torch.full((29, 1), 1 + 2.0**-10)
    base_out, scale = -torch.ones(37, 29, dtype=torch.bfloat16), torch.ones(29)
    y = kernels.rescale_fwd(base_out, ones, lora_B, scale, None, 1.0, in_place=False, rounding=NEAREST)
    assert y.eq(2.0**-10).all()


def test_results_go_where_the_caller_has_memory():
    """Between guard bands: rows of W', n, g and A in the middle of larger tensors."""
    problem = make_problem(1, 20, 33, 7, torch.bfloat16, torch.float32)
    for ops in (kernels, reference):
        (norm, scale), cast_A = ops.weight_norm(*_factors(problem), problem.scaling, A_dtype=torch.bfloat16, **ROUNDED)
        merged, _ = ops.merge(*_factors(problem), problem.scaling, dtype=torch.bfloat16, **ROUNDED)
        stack, A = torch.full((60, 33), 7.0, dtype=torch.bfloat16), torch.full((21, 33), 7.0, dtype=torch.bfloat16)
        norms = NormScale(torch.full((60,), 7.0), torch.full((60,), 7.0))
        own = slice(20, 40)
        into = NormScale(norms.norm[own], norms.scale[own])
        options = {"into": into, "A_into": A[7:14], "A_dtype": torch.bfloat16}
        ops.weight_norm(*_factors(problem), problem.scaling, **options, **ROUNDED)
        found = (*norms, A)
        assert all(torch.equal(t[at], e) for t, at, e in zip(found, (own, own, slice(7, 14)), (norm, scale, cast_A)))
        for part in into:
            part.fill_(7.0)
        ops.merge(*_factors(problem), problem.scaling, dtype=torch.bfloat16, out=stack[own], into=into, **ROUNDED)
        assert torch.equal(stack[own], merged) and torch.equal(norms.norm[own], norm)
        assert all((t[:7] == 7).all() and (t[-7:] == 7).all() for t in (stack, *found))
