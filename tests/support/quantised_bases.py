"""Quantised checkpoints of every format that is known, and the plain ones of their decoded weights."""

import json
from functools import partial

import torch
from safetensors.torch import load_file, save_file

from tests.support.adapter_folders import base_folder
from tests.support.fp4 import bytes_of
from tests.support.fp4 import parts as fp4_parts
from tests.support.fp4 import values as fp4_values
from tests.support.int4 import INTERLEAVED, decoded, parts, words

BLOCK, GROUP = 16, 16


def fp8(weight):
    N, K = weight.shape
    scales = torch.rand(-(-N // BLOCK), -(-K // BLOCK)) / 100 + 0.01
    return {"weight": (weight / spread(scales, N, K)).to(torch.float8_e4m3fn), "weight_scale_inv": scales}


def spread(scales, N, K):
    return scales.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]


def read_fp8(tensors):
    codes = tensors["weight"].double()
    return codes * spread(tensors["weight_scale_inv"].double(), *codes.shape)


def channel_fp8(weight):
    """compressed-tensors': a scale in bf16 for each output feature."""
    scales = (torch.rand(len(weight), 1) / 100 + 0.01).bfloat16()
    return {"weight": (weight / scales).to(torch.float8_e4m3fn), "weight_scale": scales}


def read_channel_fp8(tensors):
    return tensors["weight"].double() * tensors["weight_scale"].double()


def fp4(kind, weight):
    codes, scales, factor, _ = fp4_parts(kind, *weight.shape)
    tensors = {"weight_packed": bytes_of(codes), "weight_scale": scales}
    return tensors if factor is None else tensors | {"weight_global_scale": factor}


def read_fp4(tensors):
    pairs, scales = tensors["weight_packed"].int(), tensors["weight_scale"]
    codes = torch.stack((pairs % 16, pairs // 16), dim=2).flatten(1)
    is_nvfp4 = "weight_global_scale" in tensors
    spread = scales.float() / tensors["weight_global_scale"] if is_nvfp4 else 2.0 ** (scales.float() - 127)
    return fp4_values(codes, spread).double()


def compressed(weight):
    N, K = weight.shape
    codes, scales, _ = parts(N, K, GROUP, torch.float32, symmetric=True)
    return {"weight_packed": words(codes, 1), "weight_scale": scales, "weight_shape": torch.tensor((N, K))}


def gptq(weight):
    N, K = weight.shape
    codes, scales, zeros = parts(N, K, GROUP, torch.float32)
    groups = (torch.arange(K) // GROUP)[torch.randperm(K)]
    # The file holds zeros less one, of which 0 wraps: none is drawn.
    stored = words((zeros.clamp(min=1) - 1).T, 1)
    return {"qweight": words(codes.T, 0), "scales": scales.T.contiguous(), "qzeros": stored, "g_idx": groups.int()}


def awq(weight):
    N, K = weight.shape
    codes, scales, zeros = parts(N, K, GROUP, torch.float32)
    order = INTERLEAVED
    packed = {"qweight": words(codes.T, 1, order), "qzeros": words(zeros.T, 1, order)}
    return packed | {"scales": scales.T.contiguous()}


def unpacked(tensor, dim, order=range(8)):
    tensor = tensor.movedim(dim, -1)
    codes = torch.empty(*tensor.shape, 8, dtype=torch.int64)
    for place, element in enumerate(order):
        codes[..., element] = (tensor.long() >> (4 * place)) & 15
    return codes.flatten(-2).movedim(-1, dim)


def read_compressed(tensors):
    return decoded(unpacked(tensors["weight_packed"], 1), tensors["weight_scale"].double(), torch.tensor([[8]]).expand(
        tensors["weight_scale"].shape))  # fmt: skip


def read_gptq(tensors):
    zeros = unpacked(tensors["qzeros"], 1).T + 1
    return decoded(unpacked(tensors["qweight"], 0).T, tensors["scales"].T.double(), zeros, tensors["g_idx"].long())


def read_awq(tensors):
    zeros = unpacked(tensors["qzeros"], 1, INTERLEAVED).T
    return decoded(unpacked(tensors["qweight"], 1, INTERLEAVED).T, tensors["scales"].T.double(), zeros)


def of_compressed_tensors(form, **weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": GROUP, "strategy": "group"}
GROUPS = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}}
KINDS = {
    "fp8": ("fp8", fp8, read_fp8, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}),
    "compressed_tensors": (
        "int4", compressed, read_compressed,
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": GROUPS},
    ),
    "compressed_fp8": (
        "fp8", channel_fp8, read_channel_fp8,
        of_compressed_tensors("float-quantized", num_bits=8, type="float", symmetric=True, strategy="channel"),
    ),
    "nvfp4": (
        "fp4", partial(fp4, "nvfp4"), read_fp4,
        of_compressed_tensors("nvfp4-pack-quantized", **FLOAT4, group_size=16, strategy="tensor_group"),
    ),
    "mxfp4": (
        "fp4", partial(fp4, "mxfp4"), read_fp4,
        of_compressed_tensors("mxfp4-pack-quantized", **FLOAT4, group_size=32, strategy="group"),
    ),
    "gptq": ("int4", gptq, read_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "awq": ("int4", awq, read_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
}  # fmt: skip


def bases(path, kind):
    """A quantised base, and the plain one of its decoded weights, in fp32."""
    _, quantise, read, config = KINDS[kind]
    torch.manual_seed(0)
    plain, quantised = base_folder(path / "plain"), base_folder(path / "quantised")
    dense = load_file(plain / "model.safetensors")
    packed = {}
    for key, tensor in list(dense.items()):
        if key.endswith("_proj.weight") and not (kind == "mxfp4" and tensor.shape[1] % 32):
            layer = quantise(tensor)
            packed |= {f"{key.removesuffix('weight')}{name}": part for name, part in layer.items()}
            dense[key] = read(layer).float().contiguous()
        else:
            packed[key] = tensor
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, quantised / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    return plain, quantised


def of_layer(tensors, path):
    prefix = f"{path}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
