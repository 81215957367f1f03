"""transformers' FP8 layers with random codes and scales."""

import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear


def linear_fp8(N, K, block=(16, 32), scale_fmt="float", bias=False):
    """Its forward needs a GPU and a kernel from the Hub."""
    layer = FP8Linear(K, N, block, scale_fmt=scale_fmt, has_bias=bias)
    scales = layer.weight_scale_inv
    layer.weight.data = torch.randn(N, K).to(torch.float8_e4m3fn)
    scales.data = (0.01 + torch.rand(scales.shape)).to(scales.dtype)
    if bias:
        nn.init.normal_(layer.bias)
    return layer


def decoded(layer):
    """W in fp32: each code times the scale of its block; the last blocks may be cut."""
    codes, scales = layer.weight.detach().float(), layer.weight_scale_inv.detach().float()
    if layer.block_size is not None:
        rows, columns = layer.block_size
        scales = scales.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
        scales = scales[: codes.shape[0], : codes.shape[1]]
    return codes * scales
