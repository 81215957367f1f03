"""An adapter's two files as a pair: digests show damage, and files that do not belong together.

The digests stand in the header of `adapter_model.safetensors`, which PEFT and transformers pass over. Files that others
wrote have none.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..config import DoraConfig
from .peft_config import CONFIG_NAME, HONOURED, OURS

MOST_HEADER = 100_000_000  # what safetensors reads of one at most
OF_TENSORS, OF_CONFIG = "dora_kernels.sha256", "dora_kernels.config_sha256"


def digests(tensors: Mapping[str, torch.Tensor], config: DoraConfig) -> dict[str, str]:
    """What a file with these tensors, named without prefix or compatible spelling, says of itself and its config."""
    of_tensors = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        of_tensors.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        of_tensors.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    fields = {name: getattr(config, name) for name in HONOURED}
    if fields["target_parameters"] is None:  # files of models without experts say nothing of them
        del fields["target_parameters"]
    fields |= {name: True for name in OURS if getattr(config, name)}
    fields = json.dumps(fields, sort_keys=True)
    return {OF_TENSORS: of_tensors.hexdigest(), OF_CONFIG: hashlib.sha256(fields.encode()).hexdigest()}


def save_with_header(tensors: dict[str, torch.Tensor], path: Path, header: dict[str, str]) -> None:
    """Writes the tensors as safetensors, with these entries in the header, in this order.

    safetensors itself writes the entries in random order, and equal adapters should be equal files.
    """
    try:
        save_file(tensors, path, metadata=header)
    except SafetensorError as error:  # a full disk, say, of which it makes an error of its own
        raise OSError(f"{path} cannot be written: {error}") from error
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        written = json.loads(file.read(size))
        ordered = json.dumps(written | {"__metadata__": header}, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(ordered) <= size, "the same entries in another order"
        file.seek(8)
        file.write(ordered.ljust(size))


def check_digests(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor], config: DoraConfig
) -> None:
    """Raises ValueError if the file's header (`metadata`) holds digests, and they are of something else."""
    actual = digests(tensors, config)
    if metadata.get(OF_TENSORS, actual[OF_TENSORS]) != actual[OF_TENSORS]:
        raise ValueError(f"{path} is damaged: its tensors do not match their sha256; take a sound copy or checkpoint")
    if metadata.get(OF_CONFIG, actual[OF_CONFIG]) != actual[OF_CONFIG]:
        raise ValueError(
            f"{path.with_name(CONFIG_NAME)} is not the one that {path.name} was saved with: it is damaged, or of "
            "another adapter. If you changed it on purpose, load the adapter with PEFT and save it anew"
        )


def carries_digests(path: Path) -> bool:
    """Whether a file of adapter weights, sound or not, was written with them."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return OF_TENSORS.encode() in file.read(min(length, MOST_HEADER))
