"""transformers' FP8 layers with random codes and scales."""

import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear, _dequantize_fp8_weight


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
    """W in fp32, by transformers."""
    scales = layer.weight_scale_inv.detach()
    return _dequantize_fp8_weight(layer.weight.detach(), scales, layer.block_size, torch.float32)
