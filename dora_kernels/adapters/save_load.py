"""`save_adapter` and `load_adapter`: adapters on disk, in PEFT's files."""

import math
import os
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ..config import DoraConfig, check_bools
from ..layers import Model
from ..layers.adapting import layer_class
from ..layers.dora_layer import DoraLayer
from ..layers.experts import adapted_experts
from ..models.apply import adapt, check_targets
from ..models.lost_state import warn_of_statistics
from ..models.merge import check_finite
from ..models.modules import check_model, check_not_sharded, dora_layers
from ..models.targets import find_saved, rank_and_alpha
from .atomic import move_files
from .base_tensors import check_base, copy_base, resized_embeddings, split_base
from .expert_tensors import (
    HEADER,
    MAGNITUDE,
    copy_experts,
    expert_tensors,
    planned_experts,
    warn_of_experts,
    wrapped_experts,
)
from .integrity import check_digests, digests, save_with_header
from .peft_config import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    adapter_fields,
    read_config,
    warn_of_misread,
    without_absent_modules,
    write_config,
)

SCALE = "lora_magnitude_scale"


def save_adapter(model: nn.Module, directory: str | os.PathLike, compat: str = "peft", *, scales: bool = False) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, as PEFT does, making `directory` if need be.

    Atomic: after a crash each file is the old or the new one. A save that fails leaves the adapter that was there. A
    crash between the two files leaves the old weights beside the new config; loading refuses them if the configs
    differ. Where the vocabulary was resized the embeddings are stored too, as PEFT stores them.

    Args:
        compat: "peft" writes the magnitude's key as PEFT does; transformers' own `load_adapter` silently drops it.
            "transformers" appends ".weight" to it, which transformers, PEFT and `load_adapter` all read.
        scales: also write g = m / n of each layer, fp32 [out_features], as `lora_magnitude_scale`. With it
            y = g ⊙ (x Wᵀ + s x Aᵀ Bᵀ) + b needs no norm of W. It belongs to this base. Loading passes over it. A stack
            of experts has one for each, [experts, out_features].

    PEFT cannot load the adapters of fused experts, and a warning says so: A and B are in its layout, m is added.

    Raises:
        ValueError: another `compat`, a model without DoRA layers, NaN or infinity in an adapter, or sharded weights
            whose norm is asked for.
        NotADirectoryError: `directory` is a file.
    """
    if compat not in ("peft", "transformers"):
        raise ValueError(f'compat should be "peft" or "transformers", got {compat!r}')
    check_bools(scales=scales)
    check_model(model)
    if not hasattr(model, "dora_config"):
        raise ValueError(
            "The model holds no adapter: pass the model that apply_dora returned, not a wrapper around it, before "
            "merge_dora (or after unmerge_dora)"
        )
    # The frozen base may well be sharded: its weights are not written.
    check_not_sharded((_adapter_tensors(model) | expert_tensors(model)).items())
    check_finite(dora_layers(model) | adapted_experts(model))
    warn_of_statistics(model, find_saved(model, model.dora_config))
    warn_of_misread(model)
    warn_of_experts(model)
    parameters = _adapter_tensors(model) | expert_tensors(model) | resized_embeddings(model)
    parameters |= _scales(model) if scales else {}
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in parameters.items()}
    spelled = {PREFIX + stored_key(key, compat): tensor for key, tensor in tensors.items()}
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} should be a directory, not a file")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=directory) as temporary:
        staged = Path(temporary)
        write_config(adapter_fields(model), staged)
        header = {"format": "pt"} | digests(tensors, read_config(staged, spelled))
        header |= HEADER if adapted_experts(model) else {}
        save_with_header(spelled, staged / WEIGHTS_NAME, header)
        move_files(staged, directory, (CONFIG_NAME, WEIGHTS_NAME))


def stored_key(key: str, compat: str) -> str:
    """PEFT's key of a tensor as `compat` spells it in the file."""
    suffix = ".weight" if compat == "transformers" else ""
    return key + (suffix if key.endswith(MAGNITUDE) else "")


def load_adapter(model: Model, directory: str | os.PathLike) -> Model:
    """Loads an adapter that PEFT or `save_adapter` wrote. Returns the model, adapters trainable.

    A plain model gets its DoRA layers from the file's config. A model that has them (`apply_dora` with the `impl`,
    `space` or `dropout_mode` of your choice) must match the file and keeps its own settings. What is stored
    is copied into the layers' fp32 parameters on their own device. What PEFT stored of the base model beside the
    adapter (resized embeddings, the base layer of an adapted head) goes into the base. Everything is read and checked
    first.

    Raises:
        FileNotFoundError: no such directory, or a file is missing from it.
        ValueError: a damaged file, an adapter of another kind, rank or base model, or values that are not finite. The
            message names the layer, the expected and the actual. The model is then unchanged.
        RuntimeError: inside `frozen_adapters`.
    """
    check_model(model)
    check_not_sharded(_adapter_tensors(model).items())
    layers = dora_layers(model) | adapted_experts(model)
    if any(layer.frozen_scale is not None for layer in layers.values()):
        raise RuntimeError(
            "cannot load an adapter inside frozen_adapters: its norms would go stale; leave the scope first"
        )
    directory = Path(directory)
    config, header, tensors = _read(directory)
    if layers:
        expected = _meta(_adapter_tensors(model) | expert_tensors(model))
    else:
        fitting = without_absent_modules(config, [name for name, _ in model.named_modules() if name])
        expected = _planned(model, fitting)
    adapter, base = split_base(model, _without_scales(tensors), expected)
    _check_tensors(directory / WEIGHTS_NAME, adapter, expected)
    check_base(directory / WEIGHTS_NAME, model, base)
    check_digests(directory / WEIGHTS_NAME, header, tensors, config)
    if layers:
        _check_scaling(layers, config)
        _warn_of_merge_aware(layers, config)
    else:
        adapt(model, fitting)
    with torch.no_grad():
        for key, parameter in _adapter_tensors(model).items():
            parameter.copy_(adapter[key])
    copy_experts(model, adapter)
    copy_base(model, base)
    return model


def check_files(directory: Path) -> None:
    """Raises FileNotFoundError or ValueError, as `load_adapter` does, for what needs no model to be seen."""
    config, header, tensors = _read(directory)
    check_digests(directory / WEIGHTS_NAME, header, tensors, config)


def _read(directory: Path) -> tuple[DoraConfig, dict[str, str], dict[str, torch.Tensor]]:
    """The config; the header and the tensors of the file, these by PEFT's keys without their prefix."""
    _check_files(directory)
    return read_config(directory), *_read_tensors(directory / WEIGHTS_NAME)


def _adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A patched model's adapter by PEFT's keys, without their prefix: the parameters themselves."""
    tensors = {}
    for path, layer in dora_layers(model).items():
        tensors |= {f"{path}.{stored}": getattr(layer, name) for name, stored in layer.file_names.items()}
    config = getattr(model, "dora_config", None)
    return tensors | (_saved_tensors(model, config) if config else {})


@torch.no_grad()
def _scales(model: nn.Module) -> dict[str, torch.Tensor]:
    """g = m / n of each layer, by the keys of the file, without their prefix."""
    layers = dora_layers(model) | dict(wrapped_experts(model))
    return {f"{path}.{SCALE}": layer.weight_norm().scale.float() for path, layer in layers.items()}


def _without_scales(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(f".{SCALE}")}


def _planned(model: nn.Module, config: DoraConfig) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of what `_adapter_tensors` will return once `config` is applied."""
    planned = {}
    for path, module in check_targets(model, config).items():
        r, _ = rank_and_alpha(config, path)
        kind = layer_class(module)
        for name, shape in kind.shapes_of(module, r).items():
            planned[f"{path}.{kind.file_names[name]}"] = list(shape), torch.float32
    return planned | planned_experts(model, config) | _meta(_saved_tensors(model, config))


def _meta(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[list[int], torch.dtype]]:
    return {key: (list(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def _saved_tensors(model: nn.Module, config: DoraConfig) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{name}": tensor
        for path, module in find_saved(model, config).items()
        for name, tensor in module.state_dict(keep_vars=True).items()
    }


def _check_files(directory: Path) -> None:
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory; an adapter on the Hub is fetched with huggingface_hub.snapshot_download"
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            pickled = name == WEIGHTS_NAME and (directory / "adapter_model.bin").is_file()
            hint = "; adapter_model.bin is a pickle: load it with PEFT and save it as safetensors" if pickled else ""
            raise FileNotFoundError(f"Can't find '{name}' at '{directory}'{hint}")


def _read_tensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The file's header, and its tensors by PEFT's keys, without their prefix, the magnitude's spellings as one."""
    try:
        with safe_open(path, "pt") as file:
            keys = file.keys()
            header, stored = file.metadata() or {}, {name: file.get_tensor(name) for name in keys}
    except Exception as error:  # The reader raises whatever the damage leads to.
        raise ValueError(f"{path} is truncated or corrupt: {error}") from error
    tensors = {}
    for name, tensor in stored.items():
        if "dora_scale" in name:
            raise ValueError(f"{path} is a LyCORIS adapter ({name}): its norm runs over the other axis; not supported")
        if not name.startswith(PREFIX):
            raise ValueError(f"{path}: expected keys that start with {PREFIX!r}, got {name!r}: not PEFT's format")
        key = name.removeprefix(PREFIX)
        if key.endswith(f".{MAGNITUDE}.weight"):
            key = key.removesuffix(".weight")
        if key in tensors:
            raise ValueError(f"{path} holds {key} twice")
        tensors[key] = tensor
    return header, tensors


def _check_tensors(
    path: Path, tensors: dict[str, torch.Tensor], expected: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    missing, unexpected = ([k for k in a if k not in b] for a, b in ((expected, tensors), (tensors, expected)))
    if missing and not unexpected and all(key.endswith(MAGNITUDE) for key in missing):
        raise ValueError(f"{path} lacks magnitudes: {_listed(missing)}. Without them this is another model")
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit the model and {CONFIG_NAME}: missing keys: {_listed(missing)}; unexpected keys: "
            f"{_listed(unexpected)}. Is this the base model, and the model class, that it was trained with?"
        )
    for key, tensor in tensors.items():
        got, (shape, dtype) = list(tensor.shape), expected[key]
        if got != shape:
            rank = 0 if ".lora_A." in key or key.endswith("lora_embedding_A") else 1
            same_base = ".lora_" in key and MAGNITUDE not in key and _without(got, rank) == _without(shape, rank)
            hint = "an adapter of another rank" if same_base else "an adapter of another base model"
            raise ValueError(f"{path}: {key}: expected shape {shape}, got {got}: {hint}")
        if tensor.is_floating_point() != dtype.is_floating_point:
            raise ValueError(f"{path}: {key}: expected dtype {dtype}, got {tensor.dtype}")
        # In the dtype it will have: a large fp64 value is infinite in fp32.
        if not torch.isfinite(tensor.to(dtype)).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity: a diverged training run or a damaged file")


def _without(shape: list[int], dimension: int) -> list[int]:
    return shape[:dimension] + shape[dimension + 1 :]


def _check_scaling(layers: dict[str, DoraLayer], config: DoraConfig) -> None:
    for path, layer in layers.items():
        r, lora_alpha = rank_and_alpha(config, path)
        if r != layer.r or lora_alpha / (math.sqrt(r) if config.use_rslora else r) != layer.scaling:
            raise ValueError(
                f"{path}: the model has r={layer.r}, lora_alpha={layer.lora_alpha}, use_rslora={layer.use_rslora}, the "
                f"adapter's config r={r}, lora_alpha={lora_alpha}, use_rslora={config.use_rslora}"
            )


def _warn_of_merge_aware(layers: dict[str, DoraLayer], config: DoraConfig) -> None:
    others = [path for path, layer in layers.items() if getattr(layer, "merge_aware", False) != config.merge_aware]
    if others:
        trained = "with" if config.merge_aware else "without"
        warnings.warn(
            f"the adapter was trained {trained} merge_aware, and {len(others)} layers of the model ({others[0]}) "
            "differ: they keep their own setting",
            stacklevel=3,
        )


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
