"""Products of sorted tokens: PyTorch's grouped product and the loop in its place agree, forward and transposed."""

import pytest
import torch

from dora_kernels.ops import grouped
from dora_kernels.ops.grouped import expert_rows, grouped_mm
from tests.support.oracle import relative_error
from tests.tolerances import SINGLE_CASE

ENDS = torch.tensor([3, 3, 10, 11], dtype=torch.int32)
COUNTS = torch.tensor([3, 0, 7, 1])
BF16 = torch.bfloat16


def exact(x, stack):
    owners = torch.repeat_interleave(torch.arange(4), COUNTS)
    return torch.stack([token.double() @ stack[owner].double() for token, owner in zip(x, owners)])


def test_rows_are_those_of_experts_that_have_tokens():
    assert list(expert_rows(ENDS)) == [(0, slice(0, 3)), (2, slice(3, 10)), (3, slice(10, 11))]


@pytest.mark.parametrize("transposed", [False, True], ids=["as it lies", "transposed"])
def test_the_loop_has_the_grouped_products_results(transposed, monkeypatch):
    generator, calls = torch.Generator().manual_seed(0), []
    x = torch.randn(11, 16, generator=generator).to(BF16)
    stack = torch.randn(4, 24, 16, generator=generator).to(BF16).mT
    stack = stack if transposed else stack.contiguous()
    product = torch.nn.functional.grouped_mm
    monkeypatch.setattr(grouped.F, "grouped_mm", lambda *args, **others: calls.append(1) or product(*args, **others))
    found = grouped_mm(x, stack, ENDS)
    assert calls == [1]
    monkeypatch.setattr(grouped, "_is_grouped", lambda x, stack: False)
    looped = grouped_mm(x, stack, ENDS)
    assert calls == [1] and found.dtype == looped.dtype == BF16
    for y in (found, looped):
        assert relative_error(y, exact(x, stack)) <= SINGLE_CASE[BF16]


@pytest.mark.parametrize(
    ("dtype", "features"), [(torch.float32, 16), (torch.float64, 16), (BF16, 12)], ids=["fp32", "fp64", "unaligned"]
)
def test_what_the_grouped_product_does_not_take_is_looped_over(dtype, features, monkeypatch):
    monkeypatch.setattr(grouped.F, "grouped_mm", None)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, features, generator=generator).to(dtype)
    stack = torch.randn(4, features, 20, generator=generator).to(dtype)
    assert relative_error(grouped_mm(x, stack, ENDS), exact(x, stack)) <= SINGLE_CASE[dtype]
