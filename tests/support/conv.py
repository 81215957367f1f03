"""Problems of a convolution with a DoRA adapter, solved by the engine, by PEFT, and in fp64 by PyTorch alone."""

import copy

import peft
import torch
from torch import nn

from dora_kernels.layers.conv import geometry_of
from dora_kernels.ops.dora_conv import dora_conv
from tests.support.oracle import Problem

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (11,), 2: (9, 7), 3: (5, 7, 6)}
NAMES = ("y", "dx", "dA", "dB", "dm", "db")


def make_conv(dims=2, channels=4, out=6, kernel=3, dtype=torch.float32, seed=0, **settings):
    torch.manual_seed(seed)
    return CLASSES[dims](channels, out, kernel, **settings).to(dtype)


def make_problem(conv, batch=2, rank=4, adapter_dtype=None, seed=0):
    """Random data for one convolution, its adapter at the scales of a trained model, in PEFT's shapes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, dims = conv.weight.detach(), conv.weight.ndim - 2
    adapter_dtype, ones = adapter_dtype or weight.dtype, [1] * dims
    lora_A = normal(rank, conv.in_channels, *conv.kernel_size)
    lora_B = normal(conv.out_channels, rank // conv.groups, *ones)
    lora_A *= 0.5 * weight.double().std() / rank**0.5
    magnitude = weight.double().flatten(1).norm(dim=1) * (1 + 0.1 * normal(conv.out_channels))
    x = normal(batch, conv.in_channels, *SIZES[dims]).to(weight.dtype)
    return Problem(
        x=x,
        weight=weight,
        lora_A=lora_A.to(adapter_dtype),
        lora_B=lora_B.to(adapter_dtype),
        magnitude=magnitude.view(1, -1, *ones).to(adapter_dtype),
        bias=None if conv.bias is None else conv.bias.detach(),
        grad_y=normal(*conv(x).shape).to(weight.dtype),
    )


def collect(y, leaves, grad_y):
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, grad_y))))


def solve(conv, problem, **options):
    """By the engine."""
    leaves = problem.leaves()
    x, lora_A, lora_B, magnitude, *bias = leaves
    y = dora_conv(
        x, problem.weight, lora_A, lora_B, magnitude,
        scaling=problem.scaling, geometry=geometry_of(conv), bias=bias[0] if bias else None, **options,
    )  # fmt: skip
    return collect(y, leaves, problem.grad_y)


def exact(conv, problem):
    """In fp64: W' in full, the norm detached, and PyTorch's own convolution, differentiated by autograd."""
    leaves = problem.leaves(torch.Tensor.double)
    x, lora_A, lora_B, magnitude, *bias = leaves
    weight = problem.weight.double()
    adapted = weight + problem.scaling * torch.einsum("nr,rc...->nc...", lora_B.flatten(1), lora_A)
    norm = adapted.detach().flatten(1).norm(dim=1)
    merged = (magnitude.flatten() / norm).view(-1, *[1] * (weight.ndim - 1)) * adapted
    y = copy.deepcopy(conv).double()._conv_forward(x, merged, bias[0] if bias else None)
    return collect(y, leaves, problem.grad_y.double())


class OneLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def peft_model(conv, problem, **options):
    """The installed PEFT's DoRA layer over a copy of the convolution, with the problem's adapter."""
    rank = problem.lora_A.shape[0]
    config = peft.LoraConfig(
        r=rank, lora_alpha=problem.scaling * rank, target_modules=["layer"], use_dora=True, **options
    )
    model = peft.get_peft_model(OneLayer(copy.deepcopy(conv)), config, autocast_adapter_dtype=False)
    layer = model.base_model.model.layer
    for part, value in zip(parts_of(layer), (problem.lora_A, problem.lora_B, problem.magnitude)):
        part.data = value.clone()
    if problem.bias is not None:
        layer.base_layer.bias.requires_grad_()
    return model


def parts_of(layer, adapter="default"):
    """A, B and m of PEFT's layer."""
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    return [getattr(layer, name)[adapter].weight for name in names]


def solve_peft(model, problem):
    """By a PEFT model of `peft_model`, patched or not."""
    layer, x = model.base_model.model.layer, problem.x.clone().requires_grad_()
    leaves = [x, *parts_of(layer)] + ([] if problem.bias is None else [layer.base_layer.bias])
    return collect(model(x), leaves, problem.grad_y)
