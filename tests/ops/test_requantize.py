"""A matrix in a packed weight's format: W comes back to the bit, and each element takes the nearest value it can."""

import pytest
import torch

from bench.day.packed_weights import FORMATS
from dora_kernels.ops import reference
from dora_kernels.ops.base_weights import Fp4Weight, Fp8Weight, Nf4Weight
from dora_kernels.ops.requantize import requantized
from tests.tolerances import UNIT_ROUNDOFF

N, K = 40, 256
every_format = pytest.mark.parametrize("name", FORMATS)


def weight_of(name):
    weight, _ = FORMATS[name](N, K, torch.device("cpu"))
    return weight, reference.decode(weight, torch.float32)


def moved(matrix, share):
    torch.manual_seed(1)
    return matrix + share * matrix.std() * torch.randn_like(matrix)


@every_format
def test_an_unchanged_weight_comes_back_to_the_bit(name):
    weight, matrix = weight_of(name)
    again = requantized(weight, matrix)
    assert torch.equal(reference.decode(again, torch.float32), matrix)
    assert type(again) is type(weight)
    fields = [field for field in weight._fields if field not in ("codes", "packed")]
    assert all(getattr(again, field) is getattr(weight, field) for field in fields)
    for field in ("codes", "packed"):
        if hasattr(weight, field):
            old, new = getattr(weight, field), getattr(again, field)
            assert new.dtype == old.dtype and new.shape == old.shape and new.is_contiguous()


@every_format
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_each_element_takes_the_nearest_value(name, share):
    """Against all values that the element could take, one code after the other."""
    weight, matrix = weight_of(name)
    wanted = moved(matrix, share)
    found = reference.decode(requantized(weight, wanted), torch.float32)
    codes = torch.arange(256, dtype=torch.uint8) if isinstance(weight, Fp8Weight) else torch.arange(16)
    least = torch.full_like(matrix, torch.inf)
    for code in codes:
        value = reference.decode(with_one_code(weight, code), torch.float32)
        least = torch.minimum(least, (value - wanted).abs().nan_to_num(torch.inf))
    # Values are rounded to the scales' dtype when decoded, and a boundary between two of them is as inexact.
    slack = 2 * UNIT_ROUNDOFF[torch.bfloat16] * matrix.abs().max()
    assert ((found - wanted).abs() <= least + slack).all()
    assert (found - wanted).norm() <= (matrix - wanted).norm()
    assert not torch.equal(found, matrix)


def with_one_code(weight, code):
    if isinstance(weight, Fp8Weight):
        return weight._replace(codes=code.expand(N, K).contiguous().view(torch.float8_e4m3fn))
    if isinstance(weight, Fp4Weight):
        return weight._replace(codes=torch.full_like(weight.codes, 17 * int(code)))
    if isinstance(weight, Nf4Weight):
        return weight._replace(packed=torch.full_like(weight.packed, 17 * int(code)))
    word = sum(int(code) << 4 * place for place in range(8))
    return weight._replace(codes=torch.full_like(weight.codes, word - (word >> 31 << 32)))


@every_format
def test_what_is_out_of_range_becomes_its_end(name):
    weight, matrix = weight_of(name)
    found = reference.decode(requantized(weight, 100 * matrix.abs().max() * torch.ones_like(matrix)), torch.float32)
    assert torch.isfinite(found).all() and (found >= matrix).all()


@pytest.mark.parametrize(
    ("fault", "message"),
    [(lambda m: m[:-1], r"should be \[40, 256\]"), (lambda m: m.where(m < m.max(), torch.nan), "NaN or infinity")],
)
def test_another_matrix_is_refused(fault, message):
    weight, matrix = weight_of("FP8")
    with pytest.raises(ValueError, match=message):
        requantized(weight, fault(matrix))
