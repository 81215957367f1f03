"""Whether a call of PEFT's LoRA layer is fused, and why not."""

from typing import NamedTuple

import torch
from peft.tuners.lora import dora, variants
from peft.tuners.lora.layer import Embedding, _ConvNd
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..layers.conv import geometry_of, why_not_conv
from ..layers.embedding import why_not_embedding
from ..layers.support import LINEAR_CLASSES, PLAIN, why_not
from ..ops.base_weights import weight_of
from ..ops.dora_conv import why_no_weight

FORWARDS = tuple(cls.forward for cls in LINEAR_CLASSES)
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_dropout")


class Kind(NamedTuple):
    """Of which classes an adapter's parts are."""

    variant: type
    magnitude: type[nn.Module]
    factor: type[nn.Module]


_KINDS = {
    2: Kind(variants.DoraLinearVariant, dora.DoraLinearLayer, nn.Linear),
    3: Kind(variants.DoraConv1dVariant, dora.DoraConv1dLayer, nn.Conv1d),
    4: Kind(variants.DoraConv2dVariant, dora.DoraConv2dLayer, nn.Conv2d),
    5: Kind(variants.DoraConv3dVariant, dora.DoraConv3dLayer, nn.Conv3d),
}
"""By the dimensions of the base layer's weight."""


def why_left_to_peft(layer: nn.Module) -> str | None:
    """Why a call goes to PEFT in the layer's present state, or None if it is fused."""
    return why_not_base(layer) or why_not_active(layer)


def why_not_base(layer: nn.Module) -> str | None:
    """Why no adapter of this layer can be fused, because of the layer below it; None if one can."""
    base = layer.base_layer
    if isinstance(layer, Embedding):
        reason = why_not_embedding(base, kept=True)
    elif isinstance(layer, _ConvNd):
        reason = why_not_conv(base, kept=True) or _why_not_merged(base)
    else:
        reason = why_not(base, classes=(Conv1D if layer.fan_in_fan_out else nn.Linear,), kept=True)
    return reason and f"its base layer ({type(base).__name__}) {reason}"


def _why_not_merged(conv: nn.Module) -> str | None:
    """Why PEFT's forward is not the convolution by one merged weight, or None."""
    if any(step > 1 and size > 1 for step, size in zip(conv.dilation, conv.kernel_size)):
        return "is dilated, and its lora_A is not"
    return why_no_weight(geometry_of(conv), conv.kernel_size)


def why_not_active(layer: nn.Module) -> str | None:
    """Why the adapters that are active now cannot be fused, or None, over a base layer that can be."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged into its weight"
    active = active_adapters(layer)
    if len(active) != 1:
        return f"it has {len(active)} active adapters; fused is exactly one"
    return _why_not_adapter(layer, active[0])


def active_adapters(layer: nn.Module) -> list[str]:
    """The active adapters that this layer has."""
    own = layer.lora_embedding_A if isinstance(layer, Embedding) else layer.lora_A
    return [adapter for adapter in layer.active_adapters if adapter in own]


def fused_adapter(layer: nn.Module) -> str | None:
    """The adapter of a fused call in the layer's present state, or None where PEFT runs.

    A layer that was found to be fused is not walked again while `_state_of` it is the same. The alternative, setters
    that drop the memory, would miss what is set on the modules inside the layer: hooks, forwards, parametrizations.
    """
    # torch.compile guards what it traces, and traces the walk once. A model has one embedding.
    if torch.compiler.is_compiling() or isinstance(layer, Embedding):
        return None if why_left_to_peft(layer) else active_adapters(layer)[0]
    fusion, state = layer.dora_fusion, _state_of(layer)
    remembered = fusion.remembered
    if remembered is not None and remembered[0] == state:
        return remembered[1]
    if why_left_to_peft(layer) is not None:
        return None
    adapter = active_adapters(layer)[0]
    fusion.remembered = state, adapter
    return adapter


def _state_of(layer: nn.Module) -> list:
    """All that `why_left_to_peft` reads, but for what only a quantised weight's library knows.

    It holds no tensor or module, only what is true of them: an equal state has the same answer, and keeps no weight
    alive. It is written without a Python call for each module or attribute, as it runs at every call of the layer.
    """
    modules, active = layer._modules, layer._active_adapter
    names = (active,) if isinstance(active, str) else tuple(active)
    state = [
        names, (*modules["lora_A"]._modules,), layer._disable_adapters, bool(layer.merged_adapters),
        getattr(layer, "fan_in_fan_out", False), layer.cast_input_dtype_enabled, dora.ENABLE_DORA_CACHING,
    ]  # fmt: skip
    base = modules["base_layer"]
    settings = base.__dict__
    if type(base).forward not in FORWARDS and settings.get("quant_state") is None:
        # It may compute x Wᵀ + b, or be fused, under some settings alone. bitsandbytes' 4-bit layers always do.
        state += (*settings, *[value if isinstance(value, (*PLAIN, tuple)) else None for value in settings.values()])
    inside = [base]
    for name in names:
        state += (type(layer.lora_variant.get(name)), type(layer.scaling.get(name)))
        inside += [modules[part]._modules.get(name) for part in PARTS]
    for module in inside:
        if module is None:
            state += (None,)
            continue
        own = module.__dict__
        kind = module.__class__
        state += (
            kind, kind.forward, "forward" in own, own.get("_hf_hook"), own.get("quant_state") is None,
            module.training, own.get("p"),
            not module._forward_hooks, not module._forward_pre_hooks,
            not module._backward_hooks, not module._backward_pre_hooks,
        )  # fmt: skip
        # The replicas of nn.DataParallel hold theirs as plain attributes.
        for tensor in (*module._parameters.values(), own.get("weight"), own.get("bias")):
            state += (tensor.__class__,)
            if tensor is not None:
                state += (tensor.dtype, tensor.device, tensor.shape, tensor.requires_grad)
    return state


def _why_not_adapter(layer: nn.Module, adapter: str) -> str | None:
    if isinstance(layer, Embedding):
        return _why_not_embeddings_adapter(layer, adapter)
    is_conv = isinstance(layer, _ConvNd)
    kind = _KINDS[layer.base_layer.weight.ndim] if is_conv else _KINDS[2]
    if type(layer.lora_variant.get(adapter)) is not kind.variant:
        return f"its adapter {adapter!r} is not DoRA"
    lora_A, lora_B = layer.lora_A[adapter], layer.lora_B[adapter]
    magnitude, dropout = layer.lora_magnitude_vector[adapter], layer.lora_dropout[adapter]
    if not (_plain(lora_A, kind.factor) and _plain(lora_B, kind.factor) and _plain(magnitude, kind.magnitude)):
        return f"its adapter {adapter!r} has hooks, or forwards that are not PEFT's"
    if lora_B.bias is not None:
        return f"its adapter {adapter!r} has a bias"
    if not (_plain(dropout, nn.Identity) or (_plain(dropout, nn.Dropout) and dropout.p < 1)):
        return f"its adapter {adapter!r} has a dropout of its own"
    if is_conv and isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
        return f"its adapter {adapter!r} trains with dropout, for which a convolution has no merged weight"
    if not layer.cast_input_dtype_enabled:
        return "PEFT's casting of inputs is off"
    return _why_not_together(layer, adapter, magnitude, (lora_A.weight, lora_B.weight))


def _why_not_embeddings_adapter(layer: nn.Module, adapter: str) -> str | None:
    if type(layer.lora_variant.get(adapter)) is not variants.DoraEmbeddingVariant:
        return f"its adapter {adapter!r} is not DoRA"
    magnitude = layer.lora_magnitude_vector[adapter]
    if not _plain(magnitude, dora.DoraEmbeddingLayer):
        return f"its adapter {adapter!r} has hooks, or forwards that are not PEFT's"
    if layer.tp_layer is not None:
        return "it is tensor parallel"
    factors = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return _why_not_together(layer, adapter, magnitude, factors)


def _why_not_together(layer, adapter, magnitude, factors) -> str | None:
    """Why these parts of one adapter cannot be computed with, or None."""
    if dora.ENABLE_DORA_CACHING and not magnitude.training:
        return "PEFT's DoraCaching is on"
    if not isinstance(layer.scaling[adapter], (int, float)):
        return "its scaling is a tensor (prepare_model_for_compiled_hotswap), which the kernels take as a number"
    device = weight_of(layer.base_layer).device
    if not all(tensor.device == device for tensor in (*factors, magnitude.weight)):
        return f"its adapter {adapter!r} and its base layer are on several devices"
    return None


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs `kind.forward` and nothing else, so that its work may be done in its place."""
    return (
        type(module).forward is kind.forward
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )
