"""Merging into a quantised layer's own format: its scales stay, and each code becomes the nearest to W'."""

import copy

import torch
from torch import nn

from ..layers.linear import DoraLinear
from ..ops.base_weights import Fp8Weight, Nf4Weight
from ..ops.dispatch import dense_weight
from ..ops.requantize import requantized

REQUANTIZED = "requantized"
DROWNED = 0.5
"""The share of an update's norm beyond which a loss is warned of: then more of it may be lost than kept."""


def why_not_requantized(layer: DoraLinear) -> str | None:
    """Why the layer cannot be merged in its weight's own format, as what follows "it …"; None if it can."""
    weight = layer.base_weight
    if isinstance(weight, Nf4Weight) or (isinstance(weight, Fp8Weight) and _is_fp8_linear(layer.base_layer)):
        return None
    return (
        f"is a {type(layer.base_layer).__name__}: NF4 and FP8Linear run with other codes, other libraries keep copies"
    )


def _is_fp8_linear(layer: nn.Module) -> bool:
    return type(layer).__name__ == "FP8Linear"


@torch.no_grad()
def requantized_layer(layer: DoraLinear) -> tuple[nn.Module, torch.Tensor]:
    """The library's own layer with W' in it, frozen, and that weight decoded in fp32 [out_features, in_features].

    Nothing of `layer` is written.
    """
    packed = requantized(layer.base_weight, layer.merged_weight(torch.float32))
    below = _fp8_layer(layer, packed) if isinstance(packed, Fp8Weight) else _nf4_layer(layer, packed)
    return below.train(layer.training), dense_weight(packed, torch.float32)


def _fp8_layer(layer: DoraLinear, packed: Fp8Weight) -> nn.Module:
    below = copy.copy(layer.base_layer)
    below._parameters = dict(below._parameters)
    below.weight = nn.Parameter(packed.codes, requires_grad=False)
    return below


def _nf4_layer(layer: DoraLinear, packed: Nf4Weight) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    state, stored = layer.quant_state, layer.weight
    with torch.device("meta"):
        below = Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=layer.compute_dtype,
            quant_type=state.quant_type, quant_storage=stored.dtype,
        )  # fmt: skip
    below.weight = Params4bit(
        packed.packed.view(stored.dtype).view(stored.shape),
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=stored.dtype,
        module=below,
        bnb_quantized=True,
    )
    below.bias, below.quant_state = layer.bias, state
    below.support_avx512bf16_for_cpu = False
    return below
