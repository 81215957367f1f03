"""A tiny mixture whose experts are transformers' FP8Experts, and the same with their decoded values in plain stacks."""

import torch
from torch import nn
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Experts, replace_with_fp8_linear

from tests.support.tiny_experts import tiny_experts

BLOCK = (8, 4)
STACKS = ("gate_up_proj", "down_proj")


def fp8_experts(name="Qwen3-MoE", dtype=torch.float64, block=BLOCK, scale_fmt="float", **others):
    """transformers' own replacement of the experts; each block of codes has a scale that others have not."""
    model = tiny_experts(name, dtype, **others)
    plain = {path: m for path, m in model.named_modules() if path.endswith(".experts")}
    linears = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    options = {"weight_block_size": block, "scale_fmt": scale_fmt}
    replace_with_fp8_linear(model, linears, FineGrainedFP8Config(**options), pre_quantized=True)
    for path, dense in plain.items():
        experts = model.get_submodule(path)
        assert type(experts) is FP8Experts
        for stack in STACKS:
            _fill(experts, stack, getattr(dense, stack), block)
    # As `from_pretrained` leaves it.
    model.config.dtype = dtype
    return model.eval()


def _fill(experts, name, weight, block):
    _, N, K = weight.shape
    scales = getattr(experts, f"{name}_scale_inv")
    generator = torch.Generator().manual_seed(N)
    values = (0.01 + 0.03 * torch.rand(scales.shape, generator=generator)).to(scales.dtype)
    codes = (weight.float() / _spread(values, block or (-(-N // values.shape[1]), K), (N, K))).to(torch.float8_e4m3fn)
    setattr(experts, name, nn.Parameter(codes, requires_grad=False))
    setattr(experts, f"{name}_scale_inv", nn.Parameter(values, requires_grad=False))


def _spread(scales, block, size):
    wide = scales.float().repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
    return wide[:, : size[0], : size[1]]


def decoded(experts, name):
    """W [E, N, K] of a module as `fp8_experts` makes it: by the format's definition a product in fp32."""
    codes, scales = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
    _, N, K = codes.shape
    block = experts.block_size or (-(-N // scales.shape[1]), K)
    return (codes.float() * _spread(scales, block, (N, K))).double()


def plain_twin(model, name="Qwen3-MoE", dtype=torch.float64, **others):
    """The model with plain experts of the decoded values."""
    twin = tiny_experts(name, dtype, **others)
    for path, experts in model.named_modules():
        if isinstance(experts, FP8Experts):
            for stack in STACKS:
                twin.get_submodule(path).get_parameter(stack).data.copy_(decoded(experts, stack))
    return twin
