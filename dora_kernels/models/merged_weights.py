"""`merged_weights`: the weights of the merged model, one after the other, while the model stays as it is."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import nn

from ..layers.experts import Adapters, adapted_experts
from ..ops.base_weights import is_quantized, weight_of
from ..ops.dispatch import dense_weight
from .merge_experts import merged_stack
from .merge_quantized import dense_dtype
from .modules import check_not_sharded

Named = tuple[str, torch.Tensor]


def merged_weights(
    model: nn.Module, *, dtype: torch.dtype | None = None, bucket_bytes: int = 256 << 20
) -> Iterator[Named]:
    """Yields (name, tensor) of the model as `merge_dora` would leave it, with the plain model's names.

    For an engine that generates with the weights of a training step: nothing is cloned, merged in place or taken back,
    so that the model is the same to the last bit however often this runs. A weight under an adapter is computed when
    its turn comes; all others are the model's own tensors, which are not to be written. Tied weights come once.

    Args:
        model: an `apply_dora` model, or a PEFT model that `patch_peft` has patched, whose active adapter is merged.
        dtype: of all floating-point weights; None leaves each in its own. Quantised weights are decoded.
        bucket_bytes: merged weights are made ahead until they are this many bytes: so much memory is needed, and the
            tensor that was yielded last.

    Raises:
        ValueError: no DoRA layer, one that is left to PEFT in its present state, one that no plain layer can stand for,
            another adapter of PEFT's, sharded weights, or less than one byte. Nothing was computed then.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes should be at least 1, got {bucket_bytes}")
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_not_sharded(model.named_parameters())
    parts = list(_parts(model))
    adapted = {path: part for path, part in parts if _is_adapted(part)}
    for path, part in parts:
        if path in adapted and (plan := part.plan(tokens=1)).impl == "peft":
            raise ValueError(f"{path} cannot be merged: {plan.reason}")
        if reason := getattr(part, "why_not_merged", None):
            raise ValueError(f"{path} cannot be merged: it {reason}")
        if hasattr(part, "base_layer") and path not in adapted:
            raise ValueError(f"{path} is PEFT's {type(part).__name__}, which is not fused: patch_peft says why")
    for path, adapter in (stacks := adapted_experts(model)).items():
        if reason := adapter.why_not_merged:
            raise ValueError(f"{path} cannot be merged: it {reason}")
    if not adapted and not stacks:
        raise ValueError("The model has no DoRA layers: call apply_dora, or patch_peft a PEFT model, first")
    return _in_buckets(_merged(parts, dtype, dense_dtype(model)), bucket_bytes)


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(type(module), "merged_weight")


def _parts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that the plain model has, by path: of what PEFT trains a copy, the active copy."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = None if module.disable_adapters else module.modules_to_save
        module = module.original_module if active is None else active[module.active_adapters[0]]
    yield path, module
    if not _is_adapted(module):
        for name, child in module.named_children():
            if isinstance(child, Adapters):
                continue
            yield from _parts(child, f"{path}.{name}" if path else name)


@torch.no_grad()
def _merged(
    parts: list[tuple[str, nn.Module]], dtype: torch.dtype | None, decoded: torch.dtype | None
) -> Iterator[tuple[Named, int]]:
    """Name and tensor, and the bytes that were made for it; a quantised weight is `decoded` where no dtype is asked."""
    seen = set()
    for path, part in parts:
        prefix = f"{path}." if path else ""
        below = getattr(part, "base_layer", None)
        quantized = is_quantized(part if below is None else below)
        weight = None
        if _is_adapted(part):
            weight = part.merged_weight(dtype or (decoded if quantized else None))
            weight = part.from_matrix(weight)
        elif quantized:
            packed = weight_of(part)
            weight = dense_weight(packed, dtype or decoded or packed.dtype)
        if weight is not None:
            yield (f"{prefix}weight", weight), weight.nbytes
            del weight
            own = {"bias": getattr(part, "bias", None)}  # an embedding has none
        else:
            own = part._parameters | {
                n: b for n, b in part._buffers.items() if n not in part._non_persistent_buffers_set
            }
        for name, adapter in part.dora.items() if isinstance(getattr(part, "dora", None), Adapters) else ():
            stack = merged_stack(adapter, dtype)
            yield (f"{prefix}{name}", stack), stack.nbytes
            del stack, own[name]
        for name, tensor in own.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                cast = tensor.detach().to(dtype) if dtype and tensor.is_floating_point() else tensor.detach()
                yield (f"{prefix}{name}", cast), cast.nbytes * (cast.data_ptr() != tensor.data_ptr())


def _in_buckets(weights: Iterator[tuple[Named, int]], bucket_bytes: int) -> Iterator[Named]:
    bucket, filled = deque(), 0
    for named, made in weights:
        bucket.append(named)
        del named
        filled += made
        if filled >= bucket_bytes:
            while bucket:
                yield bucket.popleft()
            filled = 0
    while bucket:
        yield bucket.popleft()
