"""A merged checkpoint in one dtype of a base that is quantised: every layer decoded, the adapted ones with W' in it.

Neither the format's library nor a model is needed: one file of weights is in memory at a time.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from dora_kernels.ops.dispatch import dense_weight, merged_weight
from dora_kernels.ops.types import Rounding

from .exporting import UpdateErrors
from .quantised_checkpoint import INDEX, Adapter, Checkpoint


def write(base: str, adapter: Path, dtype: torch.dtype, output: Path) -> UpdateErrors:
    """Writes the merged checkpoint into the folder `output`. Returns what rounding to `dtype` costs, by layer.

    Raises:
        ValueError: a base in a format that is not known here, or that cannot be read; an adapter with more than DoRA
            layers, or one of a layer that the base lacks.
    """
    checkpoint, errors, adapted = Checkpoint.of(base), UpdateErrors(), Adapter.of(adapter)
    quantised = set(checkpoint.quantised)
    for path in {*quantised, *adapted.layers}:
        _weight(checkpoint, path, quantised)  # before anything is written
    for file in checkpoint.folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX:
            shutil.copyfile(file, output / file.name)
    _write_config(output / "config.json", dtype)
    written: dict[str, str] = {}
    total = 0
    for name in tqdm(sorted(set(checkpoint.files.values())), desc="decoding", unit="file", disable=None):
        tensors = {}
        with safe_open(checkpoint.folder / name, "pt") as file:
            metadata = file.metadata()
            for key in file.keys():  # noqa: SIM118
                path, _, part = key.rpartition(".")
                if path in quantised and part not in (checkpoint.codes, "bias"):
                    continue
                if (
                    part == (checkpoint.codes if path in quantised else "weight")
                    and path in quantised | adapted.layers.keys()
                ):
                    weight = _weight(checkpoint, path, quantised)
                    tensors[f"{path}.weight"] = _merged(path, weight, adapted, dtype, errors)
                else:
                    tensor = file.get_tensor(key)
                    tensors[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        save_file(tensors, output / name, metadata=metadata)
        written |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if (checkpoint.folder / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": written}
        (output / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return errors


def _weight(checkpoint: Checkpoint, path: str, quantised: set[str]):
    """The weight of a layer: packed, or the matrix of one that the base left dense."""
    return checkpoint.weight(path) if path in quantised else checkpoint.tensor(f"{path}.weight")


@torch.no_grad()
def _merged(path: str, weight, adapted: Adapter, dtype: torch.dtype, errors: UpdateErrors) -> torch.Tensor:
    if path not in adapted.layers:
        return dense_weight(weight, dtype)
    factors, dense = adapted.layers[path], dense_weight(weight, torch.float32)
    options = {"merge_aware": adapted.merge_aware}
    exact = merged_weight(weight, *factors, dtype=torch.float32, rounding=Rounding("nearest"), **options)
    merged = merged_weight(weight, *factors, dtype=dtype, rounding=adapted.rounding(path), **options)
    errors.add(path, exact - dense, merged.float() - dense)
    return merged


def _write_config(path: Path, dtype: torch.dtype) -> None:
    """The base's config as that of a dense model in `dtype`."""
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["quantization_config"]
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or "dtype" in part or "torch_dtype" in part:
            part.pop("torch_dtype", None)
            part["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
