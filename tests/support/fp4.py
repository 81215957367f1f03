"""FP4 layers as their libraries make them, packed here from random codes, so that their values are known."""

from types import SimpleNamespace

import torch
from torch import nn

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
KINDS = ("nvfp4", "mxfp4")


def parts(kind, N, K):
    """Codes [N, K], scales [N, K / group] as they are stored, the global scale, and each group's scale in fp32."""
    codes = torch.randint(16, (N, K))
    if kind == "nvfp4":
        scales = (1 + 400 * torch.rand(N, K // 16)).to(torch.float8_e4m3fn)
        factor = torch.tensor([4321.5])
        return codes, scales, factor, scales.float() / factor
    scales = torch.randint(121, 125, (N, K // 32))
    return codes, scales.to(torch.uint8), None, 2.0 ** (scales - 127).float()


def values(codes, spread, dtype=torch.bfloat16):
    """W by the formats' formula: the number that four bits say, times its group's scale, in fp32."""
    numbers = torch.tensor(E2M1 + [-number for number in E2M1])[codes]
    return (numbers * spread.repeat_interleave(codes.shape[1] // spread.shape[1], 1)).to(dtype)


def bytes_of(codes):
    """Two codes a byte, the first in the low bits."""
    return (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)


def linear_fp4(kind, N, K, bias=False):
    """compressed-tensors' layer, as transformers leaves it after loading, and W in bf16."""
    codes, scales, factor, spread = parts(kind, N, K)
    layer = nn.Linear(K, N, bias, dtype=torch.bfloat16)
    del layer.weight
    tensors = {"weight_packed": bytes_of(codes), "weight_scale": scales, "weight_global_scale": factor}
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    layer.quantization_scheme = SimpleNamespace(
        format=f"{kind}-pack-quantized",
        weights=SimpleNamespace(type="float", num_bits=4, symmetric=True),
        input_activations=None,
        output_activations=None,
    )
    return layer, values(codes, spread)
