"""The activations of a gated MLP, and their derivatives."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Activation(NamedTuple):
    function: Callable[[torch.Tensor], torch.Tensor]  # fp32 or fp64, to the bits of the model's own
    derivative: Callable[[torch.Tensor], torch.Tensor]


def _silu_derivative(x: torch.Tensor) -> torch.Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_derivative(x: torch.Tensor) -> torch.Tensor:
    """Of x / 2 · (1 + tanh u), with u = √(2/π) (x + 0.044715 x³)."""
    factor, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(factor * (x + cubic * x * x * x))
    # Beyond, tanh is 1 in fp64 too, and x² would overflow.
    x = x.clamp(-10, 10)
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * factor * (1 + 3 * cubic * x * x)


ACTIVATIONS = {
    "silu": Activation(F.silu, _silu_derivative),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_derivative),
}
