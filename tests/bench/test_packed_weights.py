"""The packed weights of the day's self-test: what the operations decode is what the formats' formulas say."""

import pytest
import torch

from bench.day.packed_weights import FORMATS
from dora_kernels.ops import reference
from tests.support.oracle import relative_error
from tests.tolerances import ORACLE_FP32

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_that_were_packed(name):
    weight, exact = FORMATS[name](40, 256, CPU)
    assert exact.dtype == torch.float64 and 0.001 < exact.std() < 1
    assert relative_error(reference.decode(weight, torch.float32), exact) <= ORACLE_FP32


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("int4")])
def test_values_of_int4_are_decoded_to_the_last_bit(name):
    weight, exact = FORMATS[name](40, 256, CPU)
    assert torch.equal(reference.decode(weight, torch.float32).double(), exact)
