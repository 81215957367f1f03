"""A quantised checkpoint, read file by file, and a merged one in its format: the base's files with other codes in the
adapted layers.

Scales, zeros, names, shapes and the config stay, so that whatever loads the base loads the result. No model is built:
one file of weights is in memory at a time.
"""

import json
import math
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dora_kernels.adapters.peft_config import read_config
from dora_kernels.adapters.save_load import MAGNITUDE, PREFIX, SCALE, WEIGHTS_NAME
from dora_kernels.models.targets import rank_and_alpha
from dora_kernels.ops.base_weights import weight_of
from dora_kernels.ops.dispatch import dense_weight, unquantised_weight
from dora_kernels.ops.requantize import requantized
from dora_kernels.ops.types import Rounding

from .checkpoint_formats import METHODS, Method, name_of
from .exporting import UpdateErrors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass
class Checkpoint:
    """A quantised checkpoint's folder, its quantization_config, and the file of each tensor."""

    folder: Path
    config: dict
    files: dict[str, str]

    @classmethod
    def of(cls, base: str, to: str | None = None) -> "Checkpoint":
        """The checkpoint at a path or on the Hub.

        Raises:
            ValueError: it is in no format that is known here, or not in the format `to`.
        """
        folder = Path(base) if Path(base).is_dir() else Path(snapshot_download(base))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        name = name_of(config)
        if name is not None and to is None and name not in METHODS:
            raise ValueError(f"{base} is quantised by {name}, which is not known here: {', '.join(METHODS)} are")
        if to is not None and (name not in METHODS or METHODS[name].to != to):
            found = f"quantised by {name}" if name else "not quantised"
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
    def method(self) -> Method:
        return METHODS[name_of(self.config)]

    @property
    def codes(self) -> str:
        """The name of a layer's tensor of codes."""
        return self.method.codes

    @property
    def quantised(self) -> list[str]:
        """The paths of the layers in the format, adapted or not."""
        paths = (key.rpartition(".")[0] for key in self.files if key.rpartition(".")[2] == self.codes)
        return [path for path in paths if f"{path}.{self.method.mark}" in self.files]

    def tensor(self, key: str) -> torch.Tensor:
        """Raises ValueError if there is none."""
        if key not in self.files:
            raise ValueError(f"{self.folder} holds no {key}, and the adapter has a layer there")
        with safe_open(self.folder / self.files[key], "pt") as file:
            return file.get_tensor(key)

    def weight(self, path: str):
        """The packed weight of the layer at `path`. Raises ValueError, with the layer's name, if it cannot be read."""

        def get(name: str, optional: bool = False) -> torch.Tensor | None:
            key = f"{path}.{name}"
            if key not in self.files and optional:
                return None
            if key not in self.files:
                raise ValueError(f"there is no {name} beside its {self.codes}")
            return self.tensor(key)

        if f"{path}.{self.codes}" not in self.files:
            raise ValueError(f"{self.folder} holds no {path}.{self.codes}, and the adapter has a layer there")
        try:
            get(self.method.mark)
            return weight_of(self.method.read(get, self.config))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} of {self.folder} cannot be read: {error}") from error


@dataclass
class Adapter:
    """A DoRA adapter's files: A, B, m and s by the path of their layer, and how W' is rounded, or served."""

    layers: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]
    mode: str
    merge_aware: bool

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
        return cls(layers, config.rounding, config.merge_aware)

    def rounding(self, path: str) -> Rounding:
        """As the layer at `path` rounds in a model."""
        return Rounding(self.mode, zlib.crc32(path.encode()))


def write(base: str, adapter: Path, to: str, output: Path) -> UpdateErrors:
    """Writes the merged checkpoint into the folder `output`. Returns what requantising costs, by layer.

    Raises:
        ValueError: a base in another format, or that cannot be read; an adapter with more than DoRA layers.
    """
    checkpoint, errors = Checkpoint.of(base, to), UpdateErrors()
    adapted = Adapter.of(adapter)
    layers = adapted.layers
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
                    tensors[key] = _merged_codes(path, checkpoint.weight(path), factors, adapted.merge_aware, errors)
                    bar.update()
            save_file(tensors, output / name, metadata=metadata)
    return errors


@torch.no_grad()
def _merged_codes(path: str, weight, factors, merge_aware: bool, errors: UpdateErrors) -> torch.Tensor:
    dense = dense_weight(weight, torch.float32)
    merged = unquantised_weight(weight, *factors)
    packed = requantized(weight, merged)
    decoded = dense_weight(packed, torch.float32)
    # What was trained with these codes loses nothing by them.
    errors.add(path, (decoded if merge_aware else merged) - dense, decoded - dense)
    return packed.codes
