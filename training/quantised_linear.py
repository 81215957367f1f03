"""A linear layer in a quantised format, rounded by its groups' largest magnitudes: to plan, to compare and to time.

It is read by the engine as a library's own layer, and without an adapter it multiplies with its decoded weight.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_kernels.ops.base_weights import Packed, weight_of
from dora_kernels.ops.dispatch import dense_weight, operations_for
from dora_kernels.ops.quantiser import nearest

FP8_BLOCK = 128
LARGEST_FP8, LARGEST_FP4, LARGEST_INT4 = 448.0, 6.0, 7.5


class Int4(NamedTuple):
    """compressed-tensors' symmetric integers, a scale in the weight's dtype for each group."""

    group: int = 128


class Fp4(NamedTuple):
    """compressed-tensors' NVFP4 or MXFP4."""

    name: str
    group: int


FORMATS = {"fp8": None, "int4": Int4(), "nvfp4": Fp4("nvfp4", 16), "mxfp4": Fp4("mxfp4", 32)}
"""By the name that users give them: transformers' FP8 in blocks of 128, and compressed-tensors' three."""


class DecodedProduct(torch.autograd.Function):
    """x Wᵀ with a packed W, which is decoded again in the backward."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x @ dense_weight(weight_of(layer), x.dtype).T

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ dense_weight(weight_of(ctx.layer), grad_y.dtype), None


class QuantisedLinear(nn.Linear):
    """What the formats share: linear layers, as the libraries' own are."""

    def __init__(self, linear: nn.Linear | Conv1D):
        nn.Module.__init__(self)
        weight = linear.weight.detach()
        self.out_features, self.in_features = weight.shape if isinstance(linear, nn.Linear) else weight.T.shape
        self.bias = linear.bias

    def hold(self, **tensors: torch.Tensor) -> None:
        """Frozen parameters by their names."""
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = DecodedProduct.apply(x, self)
        return y if self.bias is None else y + self.bias


class FP8Linear(QuantisedLinear):
    """As transformers' layer of that name, by which the engine knows it."""

    def __init__(self, linear: nn.Linear | Conv1D):
        super().__init__(linear)
        matrix = _matrix(linear)
        self.block_size = (FP8_BLOCK, FP8_BLOCK)
        rows, columns = (-(-size // FP8_BLOCK) for size in matrix.shape)
        missing = (0, columns * FP8_BLOCK - matrix.shape[1], 0, rows * FP8_BLOCK - matrix.shape[0])
        blocks = nn.functional.pad(matrix.float().abs(), missing).view(rows, FP8_BLOCK, columns, FP8_BLOCK)
        self.hold(
            weight=torch.empty_like(matrix, dtype=torch.float8_e4m3fn),
            weight_scale_inv=(blocks.amax((1, 3)) / LARGEST_FP8).clamp_min(torch.finfo(torch.float32).tiny),
        )
        self.weight.data = _nearest(self, matrix).codes


class CompressedLinear(QuantisedLinear):
    """As compressed-tensors leaves a layer, without its scheme, whose hook would decompress it."""

    def __init__(self, linear: nn.Linear | Conv1D, form: Int4 | Fp4):
        super().__init__(linear)
        matrix = _matrix(linear)
        (N, K), group = matrix.shape, form.group if matrix.shape[1] % form.group == 0 else matrix.shape[1]
        largest = matrix.float().unflatten(1, (-1, group)).abs().amax(-1)
        if isinstance(form, Int4):
            scales = (largest / LARGEST_INT4).to(matrix.dtype)
            self.hold(weight_packed=torch.empty(N, -(-K // 8), dtype=torch.int32, device=matrix.device))
        else:
            self.hold(weight_packed=torch.empty(N, K // 2, dtype=torch.uint8, device=matrix.device))
            if form.name == "nvfp4":
                whole = (LARGEST_FP8 * LARGEST_FP4 / matrix.float().abs().amax()).view(1)
                self.hold(weight_global_scale=whole)
                scales = (largest / LARGEST_FP4 * whole).to(torch.float8_e4m3fn)
            else:
                scales = (127 + (largest / LARGEST_FP4).log2().ceil()).clamp(0, 254).to(torch.uint8)
        self.hold(weight_scale=scales)
        self.weight_packed.data = _nearest(self, matrix).codes


def quantised_linear(linear: nn.Linear | Conv1D, name: str) -> QuantisedLinear:
    """The layer in the format of `FORMATS` that is called so, on the layer's device."""
    return FP8Linear(linear) if name == "fp8" else CompressedLinear(linear, FORMATS[name])


def _matrix(linear: nn.Linear | Conv1D) -> torch.Tensor:
    weight = linear.weight.detach()
    return weight if isinstance(linear, nn.Linear) else weight.T


def _nearest(layer: nn.Module, matrix: torch.Tensor) -> Packed:
    with operations_for(weight_of(layer)) as (ops, packed):
        return nearest(ops, packed, matrix.float())
