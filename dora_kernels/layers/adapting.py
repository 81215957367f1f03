"""Which of the engine's layers takes a module's place, and why none can."""

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..ops.base_weights import is_quantized, weight_of
from ..ops.served import why_not_served
from .conv import CONVOLUTIONS, DoraConv, why_not_conv, why_not_conv_class, why_not_rank
from .dora_layer import DoraLayer
from .embedding import DoraEmbedding, why_not_embedding, why_not_embedding_class
from .linear import DoraLinear
from .support import LINEAR_CLASSES, why_not, why_not_class


def layer_class(module: nn.Module) -> type[DoraLinear] | type[DoraConv] | type[DoraEmbedding] | None:
    """The layer that takes the place of a module of this kind."""
    if isinstance(module, LINEAR_CLASSES) or is_quantized(module):
        return DoraLinear
    if isinstance(module, tuple(CONVOLUTIONS.values())):
        return DoraConv
    return DoraEmbedding if isinstance(module, nn.Embedding) else None


def why_not_kind(module: nn.Module, r: int) -> str | None:
    """Why no layer takes the place of a module of this class and these settings, or None."""
    kind = layer_class(module)
    if kind is DoraConv:
        return why_not_conv_class(module) or why_not_rank(module, r)
    if kind is DoraEmbedding:
        return why_not_embedding_class(module)
    if kind is None:
        transposed = isinstance(module, _ConvNd)
        return "is a transposed convolution" if transposed else "is no linear layer, convolution or embedding"
    return why_not_class(module)


def why_not_adapted(module: nn.Module) -> str | None:
    """Why no layer takes the place of a module that `why_not_kind` has no reason for: its weight, or what wraps it."""
    return {DoraLinear: why_not, DoraConv: why_not_conv, DoraEmbedding: why_not_embedding}[layer_class(module)](module)


def why_not_merge_aware(module: nn.Module) -> str | None:
    """Why the layer in the module's place cannot quantise its merged weight, or None."""
    if layer_class(module) is not DoraLinear:
        return "is no linear layer, which merge_aware is for"
    reason = why_not_served(weight_of(module))
    return None if reason is None else f"{reason}: merge_aware has no format for it"


def computes_in_fp16(linear: nn.Module) -> bool:
    """Whether the layer in its place computes in fp16 outside autocast. Over a packed weight its input's dtype decides,
    unless bitsandbytes was told one."""
    weight = weight_of(linear)
    stored = weight.dtype if isinstance(weight, torch.Tensor) else None
    return (getattr(linear, "compute_dtype", None) or stored) == torch.float16


def adapted(module: nn.Module, *, r: int, nf4_parity: bool = False, merge_aware: bool = False, **options) -> DoraLayer:
    """The layer in the module's place; `options` as for `DoraLinear`."""
    kind = layer_class(module)
    if kind is DoraLinear:
        return DoraLinear.from_linear(module, r=r, nf4_parity=nf4_parity, merge_aware=merge_aware, **options)
    return kind(module, r=r, **options)
