"""`merge_dora` and `unmerge_dora`: plain layers again, for inference without overhead, and back."""

import torch
from torch import nn

from .linear import DoraLinear
from .patch import check_model, dora_layers, replace_module
from .tying import broken_ties, check_can_untie, retie, untie


def merge_dora(model: nn.Module, base: str | None = None, keep_base: bool = False) -> nn.Module:
    """Replaces every DoRA layer by a plain one with W' = g ⊙ (W + s B A), in place. Returns the model.

    W' is computed in fp32 and rounded once to the weight's dtype. Where a merged weight was tied (an adapted lm_head),
    its partner keeps its values and the model's config says from then on that they are not tied.

    Args:
        base: for NF4 weights, which this version does not read. A dense base takes none.
        keep_base: keep the unmerged layers too (twice the memory), so that `unmerge_dora` restores them bit for bit.

    Raises:
        ValueError: no DoRA layer (merged already, or never patched), NaN or infinity in an adapter, `base` with a dense
            weight, or tied weights in a model whose config cannot describe them untied. The model is then unchanged.
    """
    check_model(model)
    layers = dora_layers(model)
    if not layers:
        hint = "unmerge_dora takes the merge back" if hasattr(model, "dora_unmerged") else "call apply_dora first"
        raise ValueError(f"There is nothing to merge: the model has no DoRA layers, or was merged already; {hint}")
    if base is not None:
        raise ValueError(f"`base` is for quantised weights, and this model's are dense: merge without base={base!r}")
    check_finite(layers)
    broken = broken_ties(model)
    if broken:
        check_can_untie(model)

    unmerged = {"config": getattr(model, "dora_config", None), "layers": {}, "ties": None}
    if keep_base:
        model.dora_unmerged = unmerged
    for path in list(layers):
        # Popped, so that each unmerged weight is freed before the next layer is merged.
        layer = layers.pop(path)
        if keep_base:
            unmerged["layers"][path] = layer
        replace_module(model, path, layer.to_linear())
    if broken:
        unmerged["ties"] = untie(model)
    if hasattr(model, "dora_config"):
        del model.dora_config
    return model


def unmerge_dora(model: nn.Module) -> nn.Module:
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
    if unmerged["ties"] is not None:
        retie(model, **unmerged["ties"])
    model.dora_config = unmerged["config"]
    del model.dora_unmerged
    return model


def check_finite(layers: dict[str, DoraLinear]) -> None:
    """Raises ValueError, with the layer's name, where an adapter holds NaN or infinity."""
    for path, layer in layers.items():
        for name in ("lora_A", "lora_B", "magnitude"):
            if not torch.isfinite(getattr(layer, name)).all():
                raise ValueError(f"{path}.{name} holds NaN or infinity: training diverged; use an earlier checkpoint")
