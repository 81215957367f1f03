"""The formats of a quantised base, as a plan knows them: which a config says, their layers and their bytes."""

from functools import cache

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from .. import quantised_linear
from ..checkpoint_formats import METHODS, name_of
from .nf4 import Nf4Linear, linears_to_quantize, nf4_bytes

NAMES = {"nf4": "NF4", "fp8": "FP8", "int4": "int4", "nvfp4": "NVFP4", "mxfp4": "MXFP4"}
"""By the flag's word."""


def base_format_of(config: PretrainedConfig) -> str:
    """One of `NAMES`, or "" for a dense base.

    Raises:
        ValueError: the base is quantised in another way.
    """
    fields = getattr(config, "quantization_config", None)
    fields = fields.to_dict() if hasattr(fields, "to_dict") else fields
    name = name_of(fields)
    if name is None:
        return ""
    if name == "bitsandbytes" and fields.get("load_in_4bit") and fields.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    if name not in METHODS:
        raise ValueError(f"the base is quantised by {name}, which cannot be planned: --base_format names one that can")
    to = METHODS[name].to
    return "mxfp4" if "mxfp4" in name else "nvfp4" if to == "fp4" else to


def layer_in(linear: nn.Linear | Conv1D, base_format: str) -> nn.Module:
    """What takes the place of `linear`."""
    return Nf4Linear(linear) if base_format == "nf4" else quantised_linear.quantised_linear(linear, base_format)


def weight_bytes(model: nn.Module, base_format: str) -> int:
    """Bytes of the base in bf16; with a format of all linear layers but the head in it."""
    total = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    for linear in linears_to_quantize(model).values() if base_format else ():
        shape = linear.weight.shape if isinstance(linear, nn.Linear) else linear.weight.T.shape
        total += _bytes_of(*shape, base_format) - linear.weight.nbytes
    return total


@cache
def _bytes_of(out_features: int, in_features: int, base_format: str) -> int:
    if base_format == "nf4":
        return nf4_bytes(out_features * in_features)
    with torch.device("meta"):
        linear = nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16)
        return sum(tensor.nbytes for tensor in quantised_linear.quantised_linear(linear, base_format).parameters())
