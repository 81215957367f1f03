"""`merge_dora` and `unmerge_dora`: plain layers again, for inference without overhead, and back."""

import logging

import torch

from ..blocks.fuse import fuse_blocks, unfuse_blocks
from ..config import check_bools
from ..layers import Model
from ..layers.dora_layer import DoraLayer
from ..layers.experts import DoraExperts, adapted_experts
from ..ops.chunked import row_chunks
from .hooks import add_hooks, remove_hooks
from .merge_experts import merge_experts
from .merge_quantized import check_base, dense_dtype, dense_linear, quantized_layers, remove_marks, restore_marks
from .merge_requantized import DROWNED, REQUANTIZED, requantized_layer
from .modules import check_model, check_not_sharded, dora_layers, replace_module
from .tied_weights import broken_ties, check_can_untie, retie, untie

logger = logging.getLogger(__name__)


def merge_dora(
    model: Model, base: str | None = None, keep_base: bool = False, dtype: torch.dtype | None = None
) -> Model:
    """Replaces every DoRA layer by a plain one with W' = g ⊙ (W + s B A), in place. Returns the model.

    W' is computed in fp32 and rounded once to the weight's dtype. The log has the cost of rounding for each layer (at
    level INFO), and a warning where it exceeds the update. Where a merged weight was tied (an adapted lm_head), the
    other one keeps its values, and the model's config says from then on that they are not tied. W' of a stack of
    experts is written over the stack, one expert at a time.

    Args:
        base: for a quantised base, of which the merged model keeps nothing, and required there: "dequantized" merges
            into the weights that the adapter was trained on, rounded once; the path of the original model merges into
            its weights instead, which differ by the quantisation's error; "requantized" keeps the base's own format
            (NF4, or transformers' FP8), with its scales and the codes nearest to W', which loses small updates. The log
            says what each costs, as a share of the update, and for "requantized" warns from half of it on.
        keep_base: keep the unmerged layers too (twice the memory), so that `unmerge_dora` restores them bit for bit.
        dtype: of the merged weights, rounded once from fp32, and of all the model's floating-point parameters; None
            leaves each in its own, and decoded weights in the one that the model was loaded in.

    Raises:
        ValueError: no DoRA layer (merged already, or never patched), one that no plain layer can stand for (a
            convolution with groups, a stack of experts in FP8), NaN or infinity in an adapter, `base` with dense
            weights or none with quantised ones, a `dtype` that weights cannot have, or beside `keep_base` or
            "requantized", or tied weights in a model whose config cannot describe them untied.
        RuntimeError: inside `frozen_adapters`. The model is then unchanged.

    If memory runs out half way, `keep_base` puts the merged layers back. Without it they stay merged, and the same call
    merges the rest.
    """
    check_model(model)
    check_bools(keep_base=keep_base)
    check_dtype(dtype, base, keep_base)
    stacks = adapted_experts(model)
    for layer in (dora_layers(model) | stacks).values():
        layer.refuse_if_frozen("merge")
    check_not_sharded(model.named_parameters())
    layers = dora_layers(model)
    if not layers and not stacks:
        hint = "unmerge_dora takes the merge back" if hasattr(model, "dora_unmerged") else "call apply_dora first"
        raise ValueError(f"There is nothing to merge: the model has no DoRA layers, or was merged already; {hint}")
    check_finite(layers | stacks)
    check_can_merge(layers | stacks)
    original = check_base(model, layers, base)
    is_packed_again = base == REQUANTIZED
    broken = broken_ties(model)
    if broken:
        check_can_untie(model)

    unmerged = {
        "config": getattr(model, "dora_config", None),
        "layers": {},
        "experts": {},
        "ties": None,
        "quantized": None,
    }
    if keep_base:
        model.dora_unmerged = unmerged
    cause = "rounding the merged weight" if original is None else "merging into the original weight"
    if is_packed_again:
        cause = "requantising the merged weight"
    errors = {}
    try:
        for path in list(layers):
            # Popped, so that each unmerged weight is freed before the next layer is merged.
            layer = layers.pop(path)
            if is_packed_again and not isinstance(layer.base_weight, torch.Tensor):
                plain, merged = requantized_layer(layer)
            else:
                plain = layer.to_plain(
                    None if original is None else layer.to_matrix(original.get_submodule(path).weight),
                    dtype=dtype or (None if base is None or is_packed_again else dense_dtype(model)),
                )
                merged = layer.to_matrix(plain.weight)
            errors[path] = merge_error(layer, merged)
            logger.info("%s: %s costs %.2g of the update's norm", path, cause, errors[path])
            if keep_base:
                unmerged["layers"][path] = layer
            replace_module(model, path, plain)
        for path in dict.fromkeys(name.rpartition(".")[0] for name in stacks):
            kept, rounding = merge_experts(model.get_submodule(path), keep_base, dtype)
            if keep_base:
                unmerged["experts"][path] = kept
            for name, error in rounding.items():
                errors[f"{path}.{name}"] = error
                logger.info("%s.%s: rounding the merged weight costs %.2g of the update's norm", path, name, error)
    except BaseException:
        if keep_base:
            for path, layer in unmerged["layers"].items():
                replace_module(model, path, layer)
            for path, kept in unmerged["experts"].items():
                kept.put_back(model.get_submodule(path))
            del model.dora_unmerged
            if unmerged["config"] is not None and unmerged["config"].fuse_blocks:
                fuse_blocks(model)
        raise
    worst = max(errors, key=errors.get, default=None)
    most = DROWNED if is_packed_again else 1
    if worst is not None and errors[worst] > most:
        logger.warning(
            "%s costs more than %s update in %d of %d layers (%.2g times it in %s): merge into %s, or keep the adapter "
            "unmerged",
            cause.capitalize(),
            "half the" if is_packed_again else "the whole",
            sum(error > most for error in errors.values()),
            len(errors),
            errors[worst],
            worst,
            _remedy(base),
        )
    if base is not None and not is_packed_again:
        for path in quantized_layers(model):
            layer = model.get_submodule(path)
            source = None if original is None else original.get_submodule(path)
            if keep_base:
                unmerged["layers"][path] = layer
            replace_module(model, path, dense_linear(layer, source, dtype or dense_dtype(model)))
        unmerged["quantized"] = remove_marks(model)
    if broken:
        unmerged["ties"] = untie(model)
    unfuse_blocks(model)
    if dtype is not None:
        cast_parameters(model, dtype)
    if hasattr(model, "dora_config"):
        del model.dora_config
    remove_hooks(model)
    return model


def unmerge_dora(model: Model) -> Model:
    """Puts back the layers that `merge_dora(model, keep_base=True)` kept, bit for bit. Returns the model.

    Raises:
        ValueError: nothing was kept.
    """
    unmerged = getattr(model, "dora_unmerged", None)
    if unmerged is None:
        raise ValueError("There is nothing to unmerge: call merge_dora(model, keep_base=True) to be able to go back")
    for path, layer in unmerged["layers"].items():
        merged = model.get_submodule(path)
        # The model may have been moved, or switched to eval, while it was merged.
        replace_module(model, path, layer.to(merged.weight.device).train(merged.training))
    for path, kept in unmerged["experts"].items():
        kept.put_back(model.get_submodule(path))
    if unmerged["quantized"] is not None:
        restore_marks(model, **unmerged["quantized"])
    if unmerged["ties"] is not None:
        retie(model, **unmerged["ties"])
    model.dora_config = unmerged["config"]
    if model.dora_config is not None and model.dora_config.fuse_blocks:
        fuse_blocks(model)
    add_hooks(model)
    del model.dora_unmerged
    return model


@torch.no_grad()
def merge_error(layer: DoraLayer, merged: torch.Tensor) -> float:
    """‖merged − W'‖ / ‖W' − W‖ with W' in fp32: what rounding costs, as a share of the update. 0 without an update."""
    exact = layer.merged_weight(torch.promote_types(merged.dtype, torch.float32))
    base = layer.base_weight
    # A dense W as it is: beside W' there is no second matrix in fp32.
    base = base if isinstance(base, torch.Tensor) else layer.dense_base(exact.dtype)
    sums = torch.zeros(2, dtype=torch.float64, device=exact.device)
    for rows in row_chunks(*exact.shape):
        for at, other in enumerate((merged, base)):
            sums[at] += (exact[rows] - other[rows]).square().sum(dtype=torch.float64)
    error, update = sums.sqrt().tolist()
    return error / update if update > 0 else 0.0


def _remedy(base: str | None) -> str:
    """Where a merge loses less than with this `base`."""
    if base == REQUANTIZED:
        return "the dequantised base"
    return "an fp32 model" if base in (None, "dequantized") else "an fp32 model or into the dequantised base"


def check_dtype(dtype: torch.dtype | None, base: str | None, keep_base: bool) -> None:
    """Raises ValueError for a dtype that weights cannot have, or beside what keeps to the base's own."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype should be a float of 16 bits or more, torch.bfloat16 for one, got {dtype}")
    if keep_base:
        raise ValueError("dtype casts what unmerge_dora could not give back: merge without keep_base")
    if base == REQUANTIZED:
        raise ValueError(f'base="requantized" keeps the base\'s own format: merge without dtype={dtype}')


@torch.no_grad()
def cast_parameters(model: Model, dtype: torch.dtype) -> None:
    """All floating-point parameters, tied ones once, and what the config says of them."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    if hasattr(model, "config"):
        model.config.dtype = dtype


def check_can_merge(layers: dict[str, DoraLayer | DoraExperts]) -> None:
    """Raises ValueError, with the layer's name, where no plain layer computes what an adapted one does."""
    for path, layer in layers.items():
        if reason := layer.why_not_merged:
            raise ValueError(
                f"{path} cannot be merged: it {reason}; keep the adapter unmerged, or train it without this one"
            )


def check_finite(layers: dict[str, DoraLayer | DoraExperts]) -> None:
    """Raises ValueError, with the layer's name, where an adapter holds NaN or infinity."""
    for path, layer in layers.items():
        for name in ("lora_A", "lora_B", "magnitude"):
            if not torch.isfinite(getattr(layer, name)).all():
                raise ValueError(f"{path}.{name} holds NaN or infinity: training diverged; use an earlier checkpoint")
