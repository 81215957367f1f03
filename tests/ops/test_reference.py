"""The reference against an oracle that shares no code with it: W' materialised in fp64, autograd, the norm detached."""

import pytest
import torch

import dora_kernels as dk
from dora_kernels.ops import dispatch, reference
from dora_kernels.ops.dora_linear import Call, DoraLinearFunction
from dora_kernels.ops.reference.weight_norm import scale_of
from dora_kernels.ops.types import NEAREST, NormScale
from tests.support.oracle import errors, exact, make_problem, solve
from tests.tolerances import ORACLE_FP64, SAME_FP32

SHAPES = {"small": (5, 4, 3, 1), "odd": (37, 29, 53, 7), "rank-above-sides": (9, 6, 5, 17), "one": (1, 1, 1, 1)}
SPACES = ["token", "weight"]


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_oracle_in_fp64(shape, space, bias):
    problem = make_problem(*shape, dtype=torch.float64, bias=bias)
    found = errors(solve(problem, space=space, impl="reference"), exact(problem))
    assert all(error < ORACLE_FP64 for error in found.values()), found


def test_more_rows_than_a_chunk(monkeypatch):
    monkeypatch.setattr("dora_kernels.ops.chunked.CHUNK_ELEMENTS", 64)
    problem = make_problem(50, 30, 20, 3, dtype=torch.float64, bias=True)
    for space in SPACES:
        found = errors(solve(problem, space=space, impl="reference"), exact(problem))
        assert all(error < ORACLE_FP64 for error in found.values()), (space, found)


def _inner(problem, space, impl, norm):
    """y as a function of x, A, B, m, b with the norm given: the function whose derivative the backward claims to be."""

    def function(x, lora_A, lora_B, magnitude, bias):
        frozen = NormScale(norm, scale_of(magnitude.detach(), norm))
        call = Call(space, impl, problem.scaling, NEAREST, None, True)
        return DoraLinearFunction.apply(x, None, lora_A, lora_B, magnitude, bias, problem.weight, frozen, call)

    return function


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("space", SPACES)
def test_gradcheck_with_the_norm_given(space, impl):
    problem = make_problem(4, 3, 5, 2, dtype=torch.float64, bias=True)
    factors = problem.weight, problem.lora_A, problem.lora_B, problem.magnitude
    (norm, _), _ = reference.weight_norm(*factors, problem.scaling)
    assert torch.autograd.gradcheck(_inner(problem, space, impl, norm), problem.leaves())


@pytest.mark.parametrize("space", SPACES)
def test_the_norm_is_detached(space):
    """gradcheck through the norm must fail: DoRA's gradient is not the derivative of its forward (paper §4.3)."""
    problem = make_problem(4, 3, 5, 2, dtype=torch.float64)

    def function(x, lora_A, lora_B, magnitude):
        return dk.dora_linear(x, problem.weight, lora_A, lora_B, magnitude, scaling=problem.scaling, space=space)

    assert not torch.autograd.gradcheck(function, problem.leaves(), raise_exception=False)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_zero_output_features(dtype, space, impl, bias):
    """W and B zero in some features: they output their bias, their gradients are finite, others are bit-equal."""
    problem = make_problem(11, 9, 13, 3, dtype=dtype, bias=bias)
    healthy = solve(problem, space=space, impl=impl)
    zero = torch.tensor([2, 5])
    kept = torch.tensor([n for n in range(9) if n not in zero])
    problem.weight[zero], problem.lora_B[zero] = 0, 0
    solution = solve(problem, space=space, impl=impl)
    assert all(value.isfinite().all() for value in solution.values())
    bias_rows = problem.bias[zero] if bias else torch.zeros(2, dtype=dtype)
    assert torch.equal(solution["y"][:, zero], bias_rows.expand(11, 2))
    assert solution["dm"][zero].eq(0).all() and solution["dB"][zero].eq(0).all()
    assert torch.equal(solution["y"][:, kept], healthy["y"][:, kept])
    for name in ("dB", "dm"):
        assert torch.equal(solution[name][kept], healthy[name][kept]), name


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("dtype", "space"),
    [
        (torch.float64, "token"),
        (torch.float64, "weight"),
        (torch.float32, "token"),
        (torch.float32, "weight"),
        (torch.bfloat16, "token"),
        (torch.bfloat16, "weight"),
        (torch.float16, "token"),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_a_zero_magnitude_keeps_its_gradient(dtype, space, impl, bias):
    problem = make_problem(31, 9, 13, 3, dtype=dtype, bias=bias)
    problem.magnitude[4] = 0
    solution, truth = solve(problem, space=space, impl=impl), exact(problem)
    assert solution["dm"][4] != 0
    # One value, of 31 terms in 16 bits that may cancel.
    assert torch.allclose(solution["dm"][4].double(), truth["dm"][4], rtol=0.05, atol=0)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_nan_weight_stays_visible(impl):
    problem = make_problem(7, 5, 6, 2)
    problem.weight[3, 2] = torch.nan
    ops = dispatch.implementation(impl)
    (norm, scale), _ = ops.weight_norm(
        problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, problem.scaling
    )
    assert norm.isnan().tolist() == scale.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-30),
        (torch.float32, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.bfloat16, 1e30),
        (torch.float16, 6e4),
    ],
    ids=str,
)
def test_norms_beyond_the_range_of_squares(dtype, size, impl):
    weight = (torch.rand(5, 40, dtype=torch.float64) * 0.9 + 0.1) * size
    weight[3] = torch.rand(40)  # a healthy feature among them
    weight = weight.to(dtype)
    lora_A, lora_B = torch.randn(2, 40), torch.zeros(5, 2)
    magnitude = weight.double().norm(dim=1).float()
    (norm, scale), _ = dispatch.implementation(impl).weight_norm(weight, lora_A, lora_B, magnitude, 1.0)
    truth = weight.double().norm(dim=1)
    # A sum of 40 squares, a root and a quotient in fp32.
    assert torch.allclose(norm.double(), truth, rtol=1e-6, atol=0)
    assert torch.allclose(scale, torch.ones(5), rtol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("level", [1e-1, 1e-2, 1e-4, 1e-6, 1e-8])
def test_cancellation_of_weight_and_update(level, impl):
    """s B A = −(1 − level) W, so ‖V‖ is `level` ‖W‖: the norm must be as exact as fp32 holds V itself."""
    lora_A, lora_B = torch.randn(4, 60), torch.randn(8, 4)
    exact_product = (lora_B.double() @ lora_A.double()) * 2.0
    weight = (-exact_product * (1 + level)).float()
    (norm, _), _ = dispatch.implementation(impl).weight_norm(weight, lora_A, lora_B, torch.ones(8), 2.0)
    truth = (weight.double() + exact_product).norm(dim=1)
    # V is a difference of numbers of size ‖W‖ in fp32: an error of a few of its units is inherent.
    bound = 8 * 2.0**-24 * weight.double().norm(dim=1)
    assert ((norm.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-36, 1e-30], ids=str)
def test_output_features_near_zero(size, space, impl):
    """Weights down to fp32's smallest: below its smallest normal number they count as zero, above they are themselves.
    Outputs, gradients and the merged weight are finite either way, and other features bit-equal."""
    problem = make_problem(11, 9, 13, 3)
    healthy = solve(problem, space=space, impl=impl)
    small, kept = 4, [n for n in range(9) if n != 4]
    problem.weight[small], problem.lora_B[small] = torch.full((13,), size), 0
    norm = problem.weight[small].double().norm()
    problem.magnitude[small] = norm
    solution = solve(problem, space=space, impl=impl)
    merged, *_ = dispatch.implementation(impl).merge(
        problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, problem.scaling,
        dtype=torch.float32, rounding=NEAREST,
    )  # fmt: skip
    assert all(value.isfinite().all() for value in (*solution.values(), merged))
    if norm < torch.finfo(torch.float32).tiny:
        assert not solution["y"][:, small].any() and not solution["dm"][small] and not merged[small].any()
    else:
        # A norm of 13 values, a quotient and a product in fp32.
        assert torch.allclose(merged[small], problem.weight[small], rtol=1e-6, atol=0)
        assert torch.allclose(solution["dm"][small].double(), exact(problem)["dm"][small], rtol=SAME_FP32, atol=0)
    assert torch.equal(solution["y"][:, kept], healthy["y"][:, kept])
    for name in ("dB", "dm"):
        assert torch.equal(solution[name][kept], healthy[name][kept]), name


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_g_minus_1_keeps_its_digits(dtype, impl):
    """g − 1, of size 1.5e-3 as published, is the whole signal: half an ulp of a bf16 1; here to a few of fp32's."""
    problem = make_problem(1, 33, 70, 5, dtype=dtype, adapter_dtype=torch.float32, update=1e-3)
    adapted = problem.weight.double() + problem.scaling * problem.lora_B.double() @ problem.lora_A.double()
    problem.magnitude = (adapted.norm(dim=1) * (1 + 1.5e-3 * torch.randn(33, dtype=torch.float64))).float()
    (_, scale), _ = dispatch.implementation(impl).weight_norm(
        problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, problem.scaling
    )
    truth = problem.magnitude.double() / adapted.norm(dim=1) - 1
    assert truth.abs().mean() > 1e-3
    assert (scale.double() - 1 - truth).abs().max() <= 4 * 2.0**-24


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("space", SPACES)
def test_a_magnitude_may_be_negative(space, impl):
    problem = make_problem(11, 9, 13, 3, dtype=torch.float64)
    problem.magnitude[::2] *= -1
    found = errors(solve(problem, space=space, impl=impl), exact(problem))
    assert all(error < ORACLE_FP64 for error in found.values()), found
