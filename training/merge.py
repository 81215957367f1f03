"""`python -m training.merge`: an adapter and its base model become one plain checkpoint that transformers loads.

The weights are computed in fp32 and rounded once to the base model's dtype. The rounding error, as a share of the
update, is printed per layer.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

import dora_kernels as dk
from dora_kernels.models.modules import dora_layers

from .command_line import command_line
from .exporting import Sources, UpdateErrors, check_output, new_folder, update_of
from .spelling import spelled


@dataclass
class Flags:
    """What to merge, and where to put it."""

    adapter: str = HfArg(help="folder of a DoRA or LoRA adapter, from training or from PEFT")
    output_dir: str = HfArg(help="folder that does not exist yet")
    base_model: str = HfArg(default="", help="folder or Hub id; without it, the one that the adapter names")


def merge(sources: Sources, output: Path, dtype: torch.dtype | None = None) -> UpdateErrors:
    """Write the merged checkpoint and its tokenizer to the new folder `output`, in `dtype` or the base model's; a base
    that transformers loads quantised is decoded. Returns the rounding error by layer.

    Raises:
        FileExistsError: `output` exists.
        ValueError: see `load_adapter` and `merge_dora`. Nothing is written.
    """
    check_output(output)
    model = sources.load()
    errors = UpdateErrors()
    if sources.is_plain_lora:
        merged = model.merge_and_unload(safe_merge=True)
        write_model(merged if dtype is None else merged.to(dtype), sources, output)
        return errors
    for path, layer in tqdm(dora_layers(model).items(), desc="measuring", unit="layer", disable=None):
        update = update_of(layer)
        errors.add(path, update, layer.merged_weight(dtype).to(update.dtype) - layer.dense_base(update.dtype))
    merged = dk.merge_dora(model, base="dequantized" if sources.quantised_by else None, dtype=dtype)
    write_model(merged, sources, output)
    return errors


def write_model(merged: PreTrainedModel, sources: Sources, output: Path) -> None:
    """The model and its tokenizer to the new folder `output`."""
    with new_folder(output) as folder:
        # transformers cannot take back how it read a quantised checkpoint.
        merged.save_pretrained(folder, **({"save_original_format": False} if sources.quantised_by else {}))
        if not sources.copy_tokenizer(folder):
            print(f"no tokenizer found beside {sources.base_model}: copy one into {output}")


def run(flags: Flags) -> None:
    """Merge, and print the rounding errors."""
    sources = Sources(Path(flags.adapter), flags.base_model or None)
    errors = merge(sources, Path(flags.output_dir))
    if errors.norms:
        print(f"what rounding to the base model's dtype costs, as a share of each layer's update:\n{errors}")
    elif sources.is_plain_lora:
        print("plain LoRA, merged by PEFT")
    print(f"merged checkpoint: {flags.output_dir}")


def main(arguments: list[str] | None = None) -> None:
    """Run with these command-line arguments."""
    command_line(Flags, run, arguments, prog=spelled("merge"), description=__doc__)


if __name__ == "__main__":
    main()
