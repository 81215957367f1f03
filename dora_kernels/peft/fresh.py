"""Fresh PEFT adapters as an exact no-op: PEFT rounds the norm it starts the magnitude from, we do not."""

import torch
from peft.utils.integrations import dequantize_module_weight

from ..ops.dispatch import dense_weight
from .fused import FusedLayer
from .packed_layer import PackedLoraLinear


@torch.no_grad()
def make_fresh_exact(layer: FusedLayer, impl: str) -> None:
    """Puts the fp32 norm, computed as forward computes it, into fresh magnitudes; `restore_fresh` takes it back.

    Fresh is an adapter whose B is zero (of an embedding its A), in the output features where m is, bit for bit, the
    norm rounded to the weight's dtype: as PEFT computes it on this device, or to nearest. Any other magnitude is left
    alone, as is one stored in 16 bits, which cannot hold the fp32 norm.
    """
    weight = layer.base_weight
    for adapter in layer.lora_magnitude_vector:
        tensors = (weight, *layer.parameters_of(adapter))
        magnitude = tensors[-1]
        if any(tensor.device.type == "meta" or tensor.device != weight.device for tensor in tensors):
            continue
        # A scaling that is a tensor is left to PEFT.
        if not isinstance(layer.scaling[adapter], (int, float)):
            continue
        if magnitude.element_size() < 4 or magnitude.numel() != weight.shape[0] or layer.zeroed_of(adapter).any():
            continue
        norm, _ = layer.norm_and_scale(adapter, impl)
        fresh = torch.zeros_like(magnitude, dtype=torch.bool)
        for initial in _initial_norms(layer, weight, norm):
            fresh |= magnitude == initial.to(magnitude.dtype).view_as(magnitude)
        exact = torch.where(fresh, norm.to(magnitude.dtype).view_as(magnitude), magnitude)
        if not torch.equal(exact, magnitude):
            layer.dora_fusion.exact_magnitudes[adapter] = magnitude.clone(), exact
            magnitude.copy_(exact)


def _initial_norms(layer, weight, norm) -> list[torch.Tensor]:
    """The norms that PEFT may have put into the magnitude: computed as it does, or ours, each rounded as it rounds."""
    if isinstance(layer, PackedLoraLinear):
        dense = dense_weight(weight, weight.dtype)
        return [n.to(dense.dtype) for n in (torch.linalg.norm(dense, dim=1), norm)]
    if isinstance(weight, torch.Tensor):
        own = layer.base_layer.weight
        of_peft = own.norm(p=2, dim=tuple(range(1, own.ndim))) if own.ndim > 2 else torch.linalg.norm(weight, dim=1)
        return [n.to(weight.dtype) for n in (of_peft, norm)]
    # A quantised weight is dequantised, and promoted by the fp32 product of the adapter before the norm is taken.
    dense = dequantize_module_weight(layer.base_layer)
    return [torch.linalg.norm(dense.float(), dim=1), torch.linalg.norm(dense, dim=1), norm]


@torch.no_grad()
def restore_fresh(layer: FusedLayer) -> None:
    """Gives fresh magnitudes PEFT's bits again, unless the adapter was trained or loaded since."""
    for adapter, (original, exact) in layer.dora_fusion.exact_magnitudes.items():
        if adapter in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[adapter].weight
            if torch.equal(magnitude, exact.to(magnitude.device)) and not layer.zeroed_of(adapter).any():
                magnitude.copy_(original)
