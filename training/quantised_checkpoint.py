"""A merged checkpoint in its quantised base's own format: the base's files, with other codes in the adapted layers.

Scales, zeros, names, shapes and the config stay, so that whatever loads the base loads the result. No model is built:
one file of weights is in memory at a time.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from dora_kernels.adapters.peft_config import read_config
from dora_kernels.adapters.save_load import MAGNITUDE, PREFIX, SCALE, WEIGHTS_NAME
from dora_kernels.models.targets import rank_and_alpha
from dora_kernels.ops.base_weights import weight_of
from dora_kernels.ops.dispatch import dense_weight, merged_weight
from dora_kernels.ops.requantize import requantized
from dora_kernels.ops.types import Rounding

from .exporting import UpdateErrors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
Get = Callable[..., torch.Tensor | None]
"""`get(name, optional=False)`: a layer's tensor by its own name. Raises ValueError where there is none, or is None."""


def _layer(name: str, **parts) -> nn.Module:
    """What the engine reads of a library's layer of that class."""
    layer = type(name, (nn.Module,), {"qzero_format": lambda self: 2})()
    for key, value in parts.items():
        layer.register_buffer(key, value) if isinstance(value, torch.Tensor) else setattr(layer, key, value)
    return layer


def _fp8(get: Get, config: dict) -> nn.Module:
    scales = get("weight_scale_inv")
    return _layer(
        "FP8Linear",
        weight=get("weight"),
        weight_scale_inv=scales,
        block_size=config.get("weight_block_size"),
        bias=None,
    )


def _compressed_tensors(get: Get, config: dict) -> nn.Module:
    groups = list(config["config_groups"].values())
    if len(groups) != 1:
        raise ValueError(f"its quantization_config has {len(groups)} groups of layers: one is known here")
    (group,) = groups
    out_features, in_features = get("weight_shape").tolist()
    scheme = SimpleNamespace(
        format=group.get("format") or config["format"],
        weights=SimpleNamespace(**group["weights"]),
        input_activations=group.get("input_activations"),
        output_activations=group.get("output_activations"),
    )
    names = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    tensors = {name: tensor for name in names if (tensor := get(name, optional=True)) is not None}
    sizes = {"out_features": out_features, "in_features": in_features}
    return _layer("Linear", **tensors, **sizes, quantization_scheme=scheme)


def _gptq(get: Get, config: dict) -> nn.Module:
    # The checkpoint's zeros are one too small, which the library mends when it loads them.
    zeros = get("qzeros") + (0 if config.get("checkpoint_format") == "gptq_v2" else 0x11111111)
    parts = {"qweight": get("qweight"), "scales": get("scales"), "qzeros": zeros, "g_idx": get("g_idx")}
    rows, columns = parts["qweight"].shape
    sizes = {"in_features": 8 * rows, "out_features": columns, "bits": config["bits"]}
    return _layer("TorchLinear", **parts, **sizes, group_size=config["group_size"])


def _awq(get: Get, config: dict) -> nn.Module:
    if config.get("version", "gemm").lower() != "gemm":
        raise ValueError(f"its AWQ version is {config['version']}: gemm is known here")
    parts = {name: get(name) for name in ("qweight", "scales", "qzeros")}
    rows, columns = parts["qweight"].shape
    sizes = {"in_features": rows, "out_features": 8 * columns, "bits": config["bits"]}
    return _layer("AwqTorchLinear", **parts, **sizes, group_size=config["group_size"])


METHODS = {
    "fp8": ("fp8", "weight", _fp8),
    "compressed-tensors": ("int4", "weight_packed", _compressed_tensors),
    "gptq": ("int4", "qweight", _gptq),
    "awq": ("int4", "qweight", _awq),
}
"""By the config's `quant_method`: what `--to` calls it, the tensor of codes, and how a layer is read."""


@dataclass
class Checkpoint:
    """A quantised checkpoint's folder, its quantization_config, and the file of each tensor."""

    folder: Path
    config: dict
    files: dict[str, str]

    @classmethod
    def of(cls, base: str, to: str) -> "Checkpoint":
        """The checkpoint at a path or on the Hub. Raises ValueError if it is not in the format `to`."""
        folder = Path(base) if Path(base).is_dir() else Path(snapshot_download(base))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        method = config and config.get("quant_method")
        if METHODS.get(method, (None,))[0] != to:
            found = f"quantised by {method}" if method else "not quantised"
            raise ValueError(
                f"`--to {to}` writes the format of a base that is in it, and {base} is {found}: quantise the merged "
                "checkpoint (--to merged) with a tool of its own, or pass the quantised base as --base_model"
            )
        if (folder / INDEX).is_file():
            files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        else:
            with safe_open(folder / SINGLE, "pt") as file:
                files = dict.fromkeys(file.keys(), SINGLE)
        return cls(folder, config, files)

    @property
    def codes(self) -> str:
        """The name of a layer's tensor of codes."""
        return METHODS[self.config["quant_method"]][1]

    def weight(self, path: str):
        """The packed weight of the layer at `path`. Raises ValueError, with the layer's name, if it cannot be read."""

        def get(name: str, optional: bool = False) -> torch.Tensor | None:
            key = f"{path}.{name}"
            if key not in self.files and optional:
                return None
            if key not in self.files:
                raise ValueError(f"there is no {name} beside its {self.codes}")
            with safe_open(self.folder / self.files[key], "pt") as file:
                return file.get_tensor(key)

        if f"{path}.{self.codes}" not in self.files:
            raise ValueError(f"{self.folder} holds no {path}.{self.codes}, and the adapter has a layer there")
        try:
            return weight_of(METHODS[self.config["quant_method"]][2](get, self.config))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} of {self.folder} cannot be read: {error}") from error


@dataclass
class Adapter:
    """A DoRA adapter's files: A, B, m and s by the path of their layer."""

    layers: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]

    @classmethod
    def of(cls, folder: Path) -> "Adapter":
        """Raises ValueError if it holds more than DoRA layers, which a quantised checkpoint cannot take."""
        config, tensors = read_config(folder), load_file(folder / WEIGHTS_NAME)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            path, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            if part not in ("lora_A", "lora_B", MAGNITUDE, SCALE):
                raise ValueError(f"{folder} holds {key}, and of an adapter only DoRA layers fit a quantised checkpoint")
            parts.setdefault(path, {})[part] = tensor
        layers = {}
        for path, found in parts.items():
            rank, alpha = rank_and_alpha(config, path)
            scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            layers[path] = found["lora_A"], found["lora_B"], found[MAGNITUDE], scaling
        return cls(layers)


def write(base: str, adapter: Path, to: str, output: Path) -> UpdateErrors:
    """Writes the merged checkpoint into the folder `output`. Returns what requantising costs, by layer.

    Raises:
        ValueError: a base in another format, or that cannot be read; an adapter with more than DoRA layers.
    """
    checkpoint, errors = Checkpoint.of(base, to), UpdateErrors()
    layers = Adapter.of(adapter).layers
    for path in layers:
        checkpoint.weight(path)  # before anything is written
    for file in checkpoint.folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, output / file.name)
    with tqdm(total=len(layers), desc="requantising", unit="layer", disable=None) as bar:
        for name in sorted(set(checkpoint.files.values())):
            with safe_open(checkpoint.folder / name, "pt") as file:
                tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
            for path, factors in layers.items():
                if (key := f"{path}.{checkpoint.codes}") in tensors:
                    tensors[key] = _merged_codes(path, checkpoint.weight(path), factors, errors)
                    bar.update()
            save_file(tensors, output / name, metadata=metadata)
    return errors


@torch.no_grad()
def _merged_codes(path: str, weight, factors, errors: UpdateErrors) -> torch.Tensor:
    dense = dense_weight(weight, torch.float32)
    merged = merged_weight(weight, *factors, dtype=torch.float32, rounding=Rounding("nearest"), impl="auto")
    packed = requantized(weight, merged)
    errors.add(path, merged - dense, dense_weight(packed, torch.float32) - dense)
    return packed.codes
