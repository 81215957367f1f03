"""Formats of quantised checkpoints: how a layer's tensors become what the engine reads. No library is needed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

Get = Callable[..., torch.Tensor | None]
"""`get(name, optional=False)`: a layer's tensor by its own name. Raises ValueError where there is none, or is None."""


def _layer(name: str, **parts) -> nn.Module:
    """What the engine reads of a library's layer of that class."""
    layer = type(name, (nn.Module,), {"qzero_format": lambda self: 2})()
    for key, value in parts.items():
        layer.register_buffer(key, value) if isinstance(value, torch.Tensor) else setattr(layer, key, value)
    return layer


def _fp8(get: Get, config: dict) -> nn.Module:
    scales = get("weight_scale_inv")
    return _layer(
        "FP8Linear",
        weight=get("weight"),
        weight_scale_inv=scales,
        block_size=config.get("weight_block_size"),
        bias=None,
    )


def _compressed_tensors(get: Get, config: dict) -> nn.Module:
    groups = list(config["config_groups"].values())
    if len(groups) != 1:
        raise ValueError(f"its quantization_config has {len(groups)} groups of layers: one is known here")
    (group,) = groups
    scheme = SimpleNamespace(
        format=group.get("format") or config["format"],
        weights=SimpleNamespace(**group["weights"]),
        input_activations=group.get("input_activations"),
        output_activations=group.get("output_activations"),
    )
    tensors = {name: tensor for name in COMPRESSED if (tensor := get(name, optional=True)) is not None}
    layer = _layer("Linear", **tensors, quantization_scheme=scheme)
    if (packed := tensors.get("weight_packed")) is not None:
        stored = tensors.get("weight_shape")  # of FP4 there is none
        shape = (len(packed), 2 * packed.shape[1]) if stored is None else stored.tolist()
        layer.out_features, layer.in_features = shape
    return layer


def _gptq(get: Get, config: dict) -> nn.Module:
    # The checkpoint's zeros are one too small, which the library mends when it loads them.
    zeros = get("qzeros") + (0 if config.get("checkpoint_format") == "gptq_v2" else 0x11111111)
    parts = {"qweight": get("qweight"), "scales": get("scales"), "qzeros": zeros, "g_idx": get("g_idx")}
    rows, columns = parts["qweight"].shape
    sizes = {"in_features": 8 * rows, "out_features": columns, "bits": config["bits"]}
    return _layer("TorchLinear", **parts, **sizes, group_size=config["group_size"])


def _awq(get: Get, config: dict) -> nn.Module:
    if config.get("version", "gemm").lower() != "gemm":
        raise ValueError(f"its AWQ version is {config['version']}: gemm is known here")
    parts = {name: get(name) for name in ("qweight", "scales", "qzeros")}
    rows, columns = parts["qweight"].shape
    sizes = {"in_features": rows, "out_features": 8 * columns, "bits": config["bits"]}
    return _layer("AwqTorchLinear", **parts, **sizes, group_size=config["group_size"])


COMPRESSED = ("weight", "weight_packed", "weight_scale", "weight_global_scale", "weight_shape", "weight_zero_point")
COMPRESSED += ("weight_g_idx",)


class Method(NamedTuple):
    """A format of checkpoints: what `--to` calls it, a layer's tensor of codes, the tensor beside it that tells the
    layer from a dense one, and how a layer is read."""

    to: str
    codes: str
    mark: str
    read: Callable[[Get, dict], nn.Module]


METHODS = {
    "fp8": Method("fp8", "weight", "weight_scale_inv", _fp8),
    "gptq": Method("int4", "qweight", "qzeros", _gptq),
    "awq": Method("int4", "qweight", "qzeros", _awq),
    "compressed-tensors pack-quantized": Method("int4", "weight_packed", "weight_scale", _compressed_tensors),
    "compressed-tensors float-quantized": Method("fp8", "weight", "weight_scale", _compressed_tensors),
    "compressed-tensors naive-quantized": Method("fp8", "weight", "weight_scale", _compressed_tensors),
    "compressed-tensors nvfp4-pack-quantized": Method("fp4", "weight_packed", "weight_scale", _compressed_tensors),
    "compressed-tensors mxfp4-pack-quantized": Method("fp4", "weight_packed", "weight_scale", _compressed_tensors),
}
"""By the config's `quant_method`, and of compressed-tensors its format."""


def name_of(config: dict | None) -> str | None:
    """What `METHODS` calls the format of a `quantization_config`; None where there is none."""
    if not config:
        return None
    method = config.get("quant_method")
    if method != "compressed-tensors":
        return method
    groups = list(config.get("config_groups", {}).values())
    return f"{method} {(groups and groups[0].get('format')) or config.get('format')}"
