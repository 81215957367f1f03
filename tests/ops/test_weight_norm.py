"""Norms whose squares leave fp32's range, in parts that several programs add."""

import pytest
import torch

from dora_kernels.ops import kernels
from tests.tolerances import TWIN

# Of the two parts of a feature's inputs that two programs square: 2⁵⁵ is large only where both are added.
PARTS = {
    "large": (1e30, 1e30),
    "small": (1e-30, 1e-30),
    "large and healthy": (1e30, 1.0),
    "large and nearly": (2.0**56, 2.0**55),
    "large together": (2.0**55.3, 2.0**55.3),
    "small and healthy": (1e-30, 1.0),
    "healthy and small": (1.0, 1e-30),
    "zero and small": (0.0, 1e-30),
    "large and small": (1e30, 1e-30),
}


def test_a_norm_beyond_the_range_of_squares_in_splits():
    """Each program sees its part alone; the sum may leave the range where no part does, or where one does."""
    weight = torch.ones(len(PARTS), 1100)
    for row, parts in zip(weight, PARTS.values()):
        row[:640], row[640:] = parts
    lora_A, lora_B, magnitude = torch.randn(3, 1100), torch.zeros(len(PARTS), 3), torch.ones(len(PARTS))
    (norm, _), _ = kernels.weight_norm(weight, lora_A, lora_B, magnitude, 1.0)
    assert torch.allclose(norm.double(), weight.double().norm(dim=1), rtol=TWIN[torch.float32], atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [40, 70])
def test_ranks_that_take_several_blocks(rank, dtype):
    """Beside several blocks of input features: each adds to the sum."""
    generator = torch.Generator().manual_seed(0)
    weight, lora_A, lora_B = (torch.randn(*size, generator=generator) for size in ((9, 304), (rank, 304), (9, rank)))
    weight = weight.to(dtype)
    (norm, _), _ = kernels.weight_norm(weight, lora_A, lora_B, torch.ones(9), 0.5)
    expected = (weight.double() + 0.5 * lora_B.double() @ lora_A.double()).norm(dim=1)
    # The bar on bf16 pieces: 2⁻¹⁶ of the product's norm.
    assert torch.allclose(norm.double(), expected, rtol=2**-16, atol=0)
