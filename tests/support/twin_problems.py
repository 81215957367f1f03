"""The shapes at which kernels are held to their twins, and what a problem hands them."""

import pytest
import torch

from dora_kernels.ops import reference
from dora_kernels.ops.types import Rounding
from tests.support.twins import DTYPES

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


def factors_of(problem):
    return problem.weight, problem.lora_A, problem.lora_B, problem.magnitude


def norm_scale_of(problem):
    return reference.weight_norm(*factors_of(problem), problem.scaling)[0]


def token_space(problem):
    h = problem.x @ problem.lora_A.to(problem.x.dtype).T
    return problem.x @ problem.weight.T, h, problem.lora_B, norm_scale_of(problem).scale
