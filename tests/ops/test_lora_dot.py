"""Products over the rank in bf16 pieces: their error, and that nothing non-finite is lost."""

import pytest
import torch

from dora_kernels.ops import kernels
from dora_kernels.ops.base_weights import weight_of
from dora_kernels.ops.types import NEAREST
from tests.support.nf4 import decoded, linear_4bit
from tests.support.oracle import make_problem
from tests.tolerances import IN_PIECES, ORACLE_FP32

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _bf16(weight):
    return weight.bfloat16(), weight.bfloat16().double()


def _fp16(weight):
    return weight.half(), weight.half().double()


def _nf4(weight):
    linear = linear_4bit(weight, nested=False)
    return weight_of(linear), decoded(linear.weight)


CASES = {
    "r1": (_bf16, 1, FP32, FP32),
    "r16": (_bf16, 16, FP32, FP32),
    "r40": (_bf16, 40, FP32, FP32),
    "fp16": (_fp16, 16, FP32, FP32),
    "nf4": (_nf4, 16, FP32, FP32),
    "bf16 A": (_bf16, 17, BF16, FP32),
    "bf16 B": (_bf16, 17, FP32, BF16),
    "fp16 A and bf16 B": (_bf16, 17, FP16, BF16),
    "bf16 A and fp16 B": (_bf16, 17, BF16, FP16),
    "fp16 B": (_fp16, 17, FP32, FP16),
}


@pytest.mark.parametrize("update", [0.3, 1e4], ids=["a part of W", "alone"])
@pytest.mark.parametrize(("base", "rank", "A_dtype", "B_dtype"), CASES.values(), ids=CASES)
def test_error_beside_a_16_bit_or_4_bit_weight(base, rank, A_dtype, B_dtype, update):
    """Where W is nothing beside B A the whole error is along V, and n shows all of it."""
    problem = make_problem(1, 48, 128, rank, update=update)
    weight, exact_weight = base(problem.weight)
    lora_A, lora_B = problem.lora_A.to(A_dtype), problem.lora_B.to(B_dtype)
    product = problem.scaling * lora_B.double() @ lora_A.double()
    adapted = exact_weight + product
    exact_norm = adapted.norm(dim=1)
    bar = IN_PIECES * product.norm(dim=1) + ORACLE_FP32 * exact_norm
    merged, (norm, scale) = kernels.merge(
        weight, lora_A, lora_B, problem.magnitude, problem.scaling, dtype=FP32, rounding=NEAREST
    )
    assert ((norm.double() - exact_norm).abs() <= bar).all()
    assert ((merged.double() / scale.double()[:, None] - adapted).norm(dim=1) <= bar).all()


@pytest.mark.parametrize("lowest", [2.0**-10, 2.0**-23], ids=["second piece", "third piece"])
@pytest.mark.parametrize("rank", [2, 17, 40], ids="r{}".format)
def test_products_beside_a_bf16_factor_are_exact(rank, lowest):
    """Two terms cancel to what B's lower pieces hold alone."""
    head = 1 + (2.0**-10 if lowest < 2.0**-10 else 0.0)
    h, lora_A, lora_B = torch.ones(5, rank, dtype=BF16), torch.ones(rank, 16, dtype=BF16), torch.zeros(9, rank)
    lora_B[:, 0], lora_B[:, -1] = head + lowest, -head
    y = kernels.rescale_fwd(
        torch.zeros(5, 9, dtype=BF16), h, lora_B, torch.ones(9), None, 1.0, in_place=False, rounding=NEAREST
    )
    assert y.eq(lowest).all()
    (norm, _), _ = kernels.weight_norm(torch.zeros(9, 16, dtype=BF16), lora_A, lora_B, torch.ones(9), 1.0)
    assert norm.eq(4 * lowest).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_what_is_not_finite_stays_visible(factor, dtype, value):
    """An infinite factor may become NaN, and never a number."""
    problem = make_problem(3, 5, 7, 2, dtype, FP32)
    getattr(problem, factor)[1, 1] = value
    merged, (norm, _) = kernels.merge(
        problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, 1.0, dtype=dtype, rounding=NEAREST
    )
    hit = torch.tensor([factor == "lora_A" or row == 1 for row in range(5)])
    assert torch.equal(~norm.isfinite(), hit)
    assert torch.equal(~merged.isfinite().all(dim=1), hit)
    h, base_out, scale = torch.ones(3, 2, dtype=dtype), torch.zeros(3, 5, dtype=dtype), torch.ones(5)
    y = kernels.rescale_fwd(base_out, h, problem.lora_B, scale, None, 1.0, in_place=False, rounding=NEAREST)
    assert torch.equal(~y.isfinite(), (hit & (factor == "lora_B")).expand(3, 5))
