"""Merging into a quantised base: where dense weights come from, and what marks the model as quantised."""

import torch
from torch import nn

from ..layers.linear import DoraLinear
from ..ops import dispatch
from ..ops.base_weights import bias_of, is_quantized, weight_of
from .merge_requantized import REQUANTIZED, why_not_requantized

MODEL_MARKS = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")
# How the checkpoint's tensors became the model's, which saving takes back: bitsandbytes' way has no way back.
MODEL_MARKS += ("_weight_conversions",)


def check_base(model: nn.Module, layers: dict[str, DoraLinear], base: str | None) -> nn.Module | None:
    """The model of the original weights if `base` is a path, else None.

    Raises:
        ValueError: `base` with dense weights, none with quantised ones, or a model of other shapes at that path.
    """
    quantized = [path for path, layer in layers.items() if not isinstance(layer.base_weight, torch.Tensor)]
    if not quantized:
        if base is not None:
            raise ValueError(
                f"`base` is for quantised weights, and this model's are dense: merge without base={base!r}"
            )
        return None
    if base is None:
        raise ValueError(
            f'{quantized[0]} has a quantised weight, and there are several ways to merge: pass base="dequantized" '
            "for a dense one of the base that the adapter was trained on (only rounding is lost), base=PATH of the "
            "original weights (which the adapter has not seen: expect the error of the quantisation), or "
            'base="requantized" for the base\'s own format (small updates are lost, and the log says how much)'
        )
    if base == REQUANTIZED:
        for path in quantized:
            if reason := why_not_requantized(layers[path]):
                raise ValueError(f"{path} cannot be merged in its own format: it {reason}")
        return None
    if base == "dequantized":
        return None
    if not hasattr(type(model), "from_pretrained"):
        raise ValueError(
            f'base={base!r}: a {type(model).__name__} cannot be loaded from a path; use base="dequantized"'
        )
    original = type(model).from_pretrained(base, dtype="auto")
    for path in quantized_layers(model):
        shape = weight_of(_base_of(model.get_submodule(path))).shape
        try:
            found = original.get_submodule(path).weight
        except AttributeError:
            found = None
        if found is None or is_quantized(original.get_submodule(path)) or found.shape != shape:
            raise ValueError(f"base={base!r} has no dense weight {path} of shape {list(shape)}: not the original model")
    return original


def quantized_layers(model: nn.Module) -> list[str]:
    """Paths of the layers with a quantised weight, adapted or not."""
    inside = ()
    paths = []
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, DoraLinear):
            inside = f"{path}."
            if not isinstance(module.base_weight, torch.Tensor):
                paths.append(path)
        elif is_quantized(module):
            paths.append(path)
    return paths


def dense_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype the model was loaded in, where its config says so."""
    return getattr(getattr(model, "config", None), "dtype", None)


def dense_linear(layer: nn.Module, original: nn.Module | None, dtype: torch.dtype | None) -> nn.Linear:
    """A quantised layer without an adapter as an `nn.Linear` in `dtype`, or in what its weight was quantised from:
    dequantised, or with the weight of `original`."""
    weight = weight_of(layer)
    dtype = dtype or weight.dtype
    if original is not None:
        dense = original.weight.to(weight.device, dtype)
    else:
        dense = dispatch.dense_weight(weight, dtype)
    with torch.device("meta"):
        linear = nn.Linear(*reversed(dense.shape))
    linear.weight, linear.bias = nn.Parameter(dense, requires_grad=False), bias_of(layer)
    return linear.train(layer.training)


def remove_marks(model: nn.Module) -> dict:
    """Removes what marks the model and its config as quantised. Returns the arguments of `restore_marks`."""
    marks = {name: model.__dict__.pop(name) for name in MODEL_MARKS if name in model.__dict__}
    config = getattr(model, "config", None)
    quantization = config.__dict__.pop("quantization_config", None) if config is not None else None
    return {"marks": marks, "quantization_config": quantization}


def restore_marks(model: nn.Module, marks: dict, quantization_config) -> None:
    """Undoes `remove_marks`."""
    model.__dict__.update(marks)
    if quantization_config is not None:
        model.config.quantization_config = quantization_config


def _base_of(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, DoraLinear) and module.base_layer is not None else module
