"""int4 layers as their libraries make them, packed here from random codes, so that their values are known."""

import types
from types import SimpleNamespace

import torch
from torch import nn

INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)


def parts(N, K, group=None, dtype=torch.bfloat16, symmetric=False):
    """Codes [N, K], scales and zeros [N, K / group] of a random weight."""
    groups = K // (group or K)
    codes, zeros = torch.randint(16, (N, K)), torch.randint(16, (N, groups))
    scales = (0.01 + 0.02 * torch.rand(N, groups)).to(dtype)
    return codes, scales, torch.full_like(zeros, 8) if symmetric else zeros


def decoded(codes, scales, zeros, groups=None):
    """W in the scales' dtype; `groups` [K] says each input feature's group, else groups lie side by side."""
    if groups is None:
        groups = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
    return (codes - zeros[:, groups]).to(scales.dtype) * scales[:, groups]


def words(codes, dim, order=range(8)):
    """Eight codes along `dim` in a word of 32 bits, `order[i]` of each eight at bit 4 i; the last word may be cut."""
    codes = codes.movedim(dim, -1)
    codes = nn.functional.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8)).long()
    packed = sum(codes[..., element] << (4 * place) for place, element in enumerate(order))
    packed = packed - (packed >= 2**31) * 2**32
    return packed.to(torch.int32).movedim(-1, dim).contiguous()


def linear_compressed(N, K, group=None, dtype=torch.bfloat16, symmetric=True, bias=False):
    """compressed-tensors' layer, as transformers leaves it after loading, and W."""
    values = codes, scales, zeros = parts(N, K, group, dtype, symmetric)
    layer = nn.Linear(K, N, bias, dtype=dtype)
    del layer.weight
    tensors = {"weight_packed": words(codes, 1), "weight_scale": scales, "weight_shape": torch.tensor((N, K))}
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros, 0)
    for name, tensor in tensors.items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    weights = SimpleNamespace(type="int", num_bits=4, symmetric=symmetric)
    layer.quantization_scheme = SimpleNamespace(
        format="pack-quantized", weights=weights, input_activations=None, output_activations=None
    )
    module = {"__name__": "compressed_tensors.quantization.lifecycle.forward"}
    layer.forward = types.FunctionType(_forward.__code__, module).__get__(layer)
    return layer, decoded(*values)


class GptqModelLinear(nn.Module):
    """What GPTQModel's layers have in common; `layer_of` makes the classes, by name."""

    def __init__(self, N, K, group, bias=None, **tensors):
        super().__init__()
        self.in_features, self.out_features, self.group_size, self.bits = K, N, group or -1, 4
        self.format, self.zeros_version = "gptq", 2
        for name, tensor in {**tensors, "bias": bias}.items():
            self.register_buffer(name, tensor)

    def qzero_format(self):
        return self.zeros_version


def layer_of(name, *sizes, **tensors):
    return type(name, (GptqModelLinear,), {})(*sizes, **tensors)


def linear_gptq(N, K, group=None, dtype=torch.float16, act_order=False, bias=False):
    """GPTQModel's GPTQ layer and W."""
    codes, scales, zeros = parts(N, K, group, dtype)
    groups = torch.arange(K) // (group or K)
    if act_order:
        groups = groups[torch.randperm(K)]
    tensors = {
        "qweight": words(codes.T, 0),
        "scales": scales.T.contiguous(),
        "qzeros": words(zeros.T, 1),
        "g_idx": groups.int(),
        "bias": torch.randn(N, dtype=dtype) if bias else None,
    }
    return layer_of("TorchLinear", N, K, group, **tensors), decoded(codes, scales, zeros, groups)


def linear_awq(N, K, group=None, dtype=torch.float16):
    """GPTQModel's AWQ layer and W."""
    codes, scales, zeros = parts(N, K, group, dtype)
    tensors = {
        "qweight": words(codes.T, 1, INTERLEAVED),
        "scales": scales.T.contiguous(),
        "qzeros": words(zeros.T, 1, INTERLEAVED),
    }
    return layer_of("AwqTorchLinear", N, K, group, **tensors), decoded(codes, scales, zeros)


def _forward(self, x):
    raise AttributeError("the layer has no `weight`")
