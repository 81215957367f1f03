"""n and g that are kept while A, B and m hold the same bits: the kernels and their reference, with `weight_norm`."""

import pytest
import torch

from dora_kernels.ops import kernels, reference
from dora_kernels.ops.types import KeptNorm, NormScale
from tests.support.marks import slow

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# N, K, R, W's dtype and the factors'; the first's inputs are squared in several parts.
PROBLEMS = {
    "in parts": (40, 1100, 3, FP32, FP32),
    "odd": (33, 333, 24, BF16, FP32),
    "several rank blocks": (9, 640, 70, BF16, BF16),
    "fp64": (16, 64, 4, FP64, FP64),
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
every_engine = pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])


def make(problem):
    N, K, R, dtype, factor_dtype = problem
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator, dtype=FP64).to(dtype)
    factors = [torch.randn(*size, generator=generator, dtype=FP64).to(factor_dtype) for size in ((R, K), (N, R), (N,))]
    return weight, factors


def marked(ops, weight, factors):
    """Kept n and g that are one more than they should be, to be known again."""
    (norm, scale), _ = ops.weight_norm(weight, *factors, 0.5)
    return KeptNorm(*(factor.clone() for factor in factors), NormScale(norm + 1, scale + 1))


@every_engine
@every_problem
def test_equal_factors_take_what_was_kept(problem, ops):
    weight, factors = make(problem)
    kept = marked(ops, weight, factors)
    into = NormScale(*(torch.empty_like(part) for part in kept.norm_scale))
    for given in (None, into):
        found, _ = ops.kept_norm(weight, *factors, 0.5, kept, into=given)
        for part, expected in zip(found, kept.norm_scale):
            assert torch.equal(part, expected) and part.data_ptr() != expected.data_ptr()
    assert found.norm is into.norm and found.scale is into.scale


@every_engine
@pytest.mark.parametrize("place", [slow(0), -1], ids=["first", "last"])
@pytest.mark.parametrize("changed", [0, 1, 2], ids=["A", "B", "m"])
@every_problem
def test_a_changed_element_is_seen(problem, changed, place, ops):
    weight, factors = make(problem)
    kept = marked(ops, weight, factors)
    factors[changed].view(-1)[place] += 1
    expected, _ = ops.weight_norm(weight, *factors, 0.5)
    for _ in range(2):  # computed, then kept
        found, _ = ops.kept_norm(weight, *factors, 0.5, kept)
        assert all(map(torch.equal, found, expected)) and all(map(torch.equal, kept.norm_scale, expected))
        assert all(map(torch.equal, kept.factors, factors))


@every_engine
def test_a_single_feature_of_a_larger_tensor(ops):
    """Contiguous, with the stride that it has there."""
    weight, factors = make((1, 16, 2, FP32, FP32))
    factors[2] = torch.stack([factors[2], factors[2]], dim=1)[:, 0]
    assert factors[2].is_contiguous() and factors[2].stride() == (2,)
    kept = marked(ops, weight, factors)
    found, _ = ops.kept_norm(weight, *factors, 0.5, kept)
    assert all(map(torch.equal, found, kept.norm_scale))


@every_engine
def test_what_equals_in_value_but_not_in_bits(ops):
    """A zero of the other sign is computed anew, a NaN that stays is kept."""
    weight, factors = make(PROBLEMS["odd"])
    factors[2][0], factors[1][3, 0] = 0.0, float("nan")
    kept = marked(ops, weight, factors)
    assert torch.equal(ops.kept_norm(weight, *factors, 0.5, kept)[0].norm[:3], kept.norm_scale.norm[:3])
    factors[2][0] = -0.0
    expected, _ = ops.weight_norm(weight, *factors, 0.5)
    assert torch.equal(ops.kept_norm(weight, *factors, 0.5, kept)[0].norm[:3], expected.norm[:3])


def test_norms_beyond_the_range_of_squares_in_parts():
    weight = torch.ones(3, 1100)
    weight[0, :640], weight[1, 640:], weight[2] = 1e30, 1e30, 1e-30
    factors = [torch.randn(3, 1100), torch.zeros(3, 3), torch.ones(3)]
    kept = marked(kernels, weight, factors)
    factors[0][0, 0] += 1
    expected, _ = kernels.weight_norm(weight, *factors, 0.5)
    assert all(map(torch.equal, kernels.kept_norm(weight, *factors, 0.5, kept)[0], expected))
