"""The base model's own tensors in an adapter's file: PEFT stores embeddings of a resized vocabulary, and the base layer
of an adapted head."""

from collections.abc import Mapping

import torch
from torch import nn

from ..layers.dora_layer import DoraLayer
from ..models.targets import find_saved

SAVED, ORIGINAL, BASE_LAYER = ".modules_to_save.", ".original_module.", ".base_layer."


def split_base(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], expected: Mapping
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The adapter's tensors and the base model's among `tensors`, by the parameters' names.

    Of a module in `modules_to_save` PEFT may store the trained copy and the original: the original is left out.
    """
    embeddings = {f"{path}.{name}" for path, module in _embeddings(model).items() for name in module.state_dict()}
    adapter, base = {}, {}
    for key, tensor in tensors.items():
        if key in expected:
            adapter[key] = tensor
        elif SAVED in key:
            adapter[key.replace(SAVED, ".")] = tensor
        elif BASE_LAYER in key:
            base[key.replace(BASE_LAYER, ".")] = tensor
        elif key in embeddings:
            base[key] = tensor
        elif ORIGINAL not in key or key.replace(ORIGINAL, SAVED) not in tensors:
            adapter[key] = tensor
    return adapter, base


def check_base(path, model: nn.Module, base: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError where the model has no such parameter, or one of another shape."""
    for key, tensor in base.items():
        parameter = _parameter(model, key)
        if parameter is None or not parameter.is_floating_point():
            raise ValueError(f"{path} holds {key} of the base model, and this model has no such dense parameter")
        if parameter.shape != tensor.shape:
            hint = ""
            if parameter.shape[1:] == tensor.shape[1:]:
                hint = f": call model.resize_token_embeddings({tensor.shape[0]}) first"
            raise ValueError(
                f"{path}: {key}: expected shape {list(parameter.shape)}, got {list(tensor.shape)}, stored with the "
                f"adapter because the vocabulary was resized{hint}"
            )
        if not torch.isfinite(tensor.to(parameter.dtype)).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity: a diverged training run or a damaged file")


@torch.no_grad()
def copy_base(model: nn.Module, base: Mapping[str, torch.Tensor]) -> None:
    """Puts the stored values into the base model's parameters, as PEFT does."""
    for key, tensor in base.items():
        _parameter(model, key).copy_(tensor)


def resized_embeddings(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of embeddings with another number of rows than the base model's config says, by PEFT's keys.

    The base's config is read from `model.name_or_path`: a folder, or transformers' cache of the Hub. Where it is in
    neither, the vocabulary counts as unchanged, as in PEFT.
    """
    if _base_vocabulary(model) in (None, _vocabulary(getattr(model, "config", None))):
        return {}
    saved = find_saved(model, model.dora_config)
    found, seen = {}, set()
    for path, module in _embeddings(model).items():
        if any(path == other or path.startswith(f"{other}.") for other in saved):
            continue
        middle = ".base_layer" if isinstance(module, DoraLayer) else ""
        for name in ("weight", "bias"):
            parameter = getattr(module, name, None)
            # Of tied weights one is stored: loading it fills the other.
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}{middle}.{name}"] = parameter
    return found


def _embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The input and output embeddings of a Hugging Face model, by path."""
    if not hasattr(model, "get_input_embeddings"):
        return {}
    try:
        modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:  # vision models have none
        return {}
    return {path: module for path, module in model.named_modules() if any(module is each for each in modules)}


def _parameter(model: nn.Module, key: str) -> torch.Tensor | None:
    path, _, name = key.rpartition(".")
    try:
        return getattr(model.get_submodule(path), name, None)
    except AttributeError:
        return None


def _vocabulary(config) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None


def _base_vocabulary(model: nn.Module) -> int | None:
    name = getattr(model, "name_or_path", None)
    if not name or not hasattr(model, "config"):
        return None
    try:
        return _vocabulary(type(model.config).from_pretrained(name, local_files_only=True))
    except (OSError, ValueError):
        return None
