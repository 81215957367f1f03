"""Linear layers in bitsandbytes' NF4 with double quantisation, without values; the library is not needed."""

import math
from types import SimpleNamespace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

BLOCK, NESTED_BLOCK = 64, 256
FP32 = 4


def nf4_bytes(elements: int) -> int:
    """4.127 bits a weight."""
    blocks = math.ceil(elements / BLOCK)
    return math.ceil(elements / 2) + blocks + FP32 * math.ceil(blocks / NESTED_BLOCK)


def linears_to_quantize(model: nn.Module) -> dict[str, nn.Module]:
    """By path, those that loading in 4 bits would quantise: all but the head."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


class Nf4Linear(nn.Linear):
    """What takes the place of `linear`. Each use writes W out once."""

    compute_dtype = torch.bfloat16

    def __init__(self, linear: nn.Linear | Conv1D):
        nn.Module.__init__(self)
        shape = linear.weight.shape if isinstance(linear, nn.Linear) else linear.weight.T.shape
        (self.out_features, self.in_features), elements = shape, linear.weight.numel()
        blocks = math.ceil(elements / BLOCK)
        nested = SimpleNamespace(
            absmax=torch.empty(math.ceil(blocks / NESTED_BLOCK)), blocksize=NESTED_BLOCK, code=torch.empty(256)
        )
        self.weight = nn.Parameter(torch.empty(math.ceil(elements / 2), dtype=torch.uint8), requires_grad=False)
        # By it the engine knows the format.
        self.weight.quant_state = SimpleNamespace(
            absmax=torch.empty(blocks, dtype=torch.uint8), shape=shape, code=torch.empty(16), blocksize=BLOCK,
            quant_type="nf4", dtype=self.compute_dtype, nested=True, offset=torch.empty(()), state2=nested,
        )  # fmt: skip
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = Nf4Product.apply(x.to(self.compute_dtype), self)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Nf4Product(torch.autograd.Function):
    """x Wᵀ with W [out_features, in_features] that does not train."""

    @staticmethod
    def forward(ctx, x, linear):
        ctx.linear = linear
        return x @ x.new_empty(linear.out_features, linear.in_features).T

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ grad_y.new_empty(ctx.linear.out_features, ctx.linear.in_features), None
