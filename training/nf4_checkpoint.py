"""A merged checkpoint in bitsandbytes' NF4, as transformers saves and loads it."""

from pathlib import Path

import torch
from tqdm import tqdm

import dora_kernels as dk
from dora_kernels.models.merge_requantized import requantized_layer
from dora_kernels.models.modules import dora_layers

from .exporting import Sources, UpdateErrors, update_of
from .merge import write_model
from .model.base_model import nf4_config


@torch.no_grad()
def write(sources: Sources, output: Path) -> UpdateErrors:
    """Writes it to the new folder `output`. Returns what requantising costs, by layer.

    A dense base is quantised as `--quantize` does in training, and scales stay those of the base.

    Raises:
        ValueError: a base that is quantised in another way; see `load_adapter` and `merge_dora`. Nothing is written.
    """
    if sources.quantised_by not in (None, "bitsandbytes"):
        raise ValueError(
            f"`--to nf4` takes a dense base, or one in NF4, and {sources.base_model} is quantised by "
            f"{sources.quantised_by}: pass the base that the adapter was trained on, or export --to bf16"
        )
    model = sources.load(None if sources.quantised_by else nf4_config(torch.bfloat16))
    errors = UpdateErrors()
    for path, layer in tqdm(dora_layers(model).items(), desc="measuring", unit="layer", disable=None):
        update = update_of(layer)
        errors.add(path, update, requantized_layer(layer)[1] - layer.dense_base(update.dtype))
    write_model(dk.merge_dora(model, base="requantized"), sources, output)
    return errors
