"""Puts an adapter on a base model: the engine's, or PEFT's, fused or not."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import dora_kernels as dk
from dora_kernels.adapters.integrity import carries_digests
from dora_kernels.adapters.save_load import WEIGHTS_NAME, check_files, stored_key
from dora_kernels.blocks.fuse import fused_blocks, unfuse_blocks
from dora_kernels.blocks.mlp import FusedMlp
from dora_kernels.ops.base_weights import keep_packing

from ..flags import Flags
from .base_model import why_not_on_head


@dataclass(frozen=True)
class Adapter:
    """A model with an adapter. `write(folder)` writes PEFT's two files; `read(folder)` reads them back."""

    model: torch.nn.Module
    write: Callable[[Path], None]
    read: Callable[[Path], None]
    description: str


def add_adapter(model: PreTrainedModel, flags: Flags) -> Adapter:
    """Put the adapter of the flags on a model that is on its device. The same seed gives the same adapter.

    Raises:
        ValueError: the adapter of `--init_adapter` does not fit, or adapts the model's head.
    """
    torch.manual_seed(flags.seed)
    adapter = _peft_adapter(model, flags) if flags.by_peft else _engine_adapter(model, flags)
    head = model.get_output_embeddings()
    if hasattr(head, "lora_A"):
        dropout = 0.0 if flags.by_peft else head.lora_dropout
        if reason := why_not_on_head(flags.by_peft, dropout):
            raise ValueError(f"`--init_adapter` {flags.init_adapter} adapts the head: {reason}")
    return adapter


def write_for_transformers(folder: Path) -> None:
    """Rewrite an adapter's file with the keys of `save_adapter(..., compat="transformers")`."""
    tensors = load_file(folder / WEIGHTS_NAME)
    respelled = {stored_key(key, "transformers"): tensor for key, tensor in tensors.items()}
    save_file(respelled, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def _engine_adapter(model: PreTrainedModel, flags: Flags) -> Adapter:
    if flags.init_adapter:
        dk.load_adapter(model, flags.init_adapter)
        if not flags.blocks:
            unfuse_blocks(model)
    else:
        dk.apply_dora(model, flags.dora)
    layers = sum(isinstance(module, dk.DoraLinear) for module in model.modules())
    return Adapter(
        model,
        write=lambda folder: dk.save_adapter(model, folder),
        read=lambda folder: dk.load_adapter(model, folder),
        description=f"DoRA on {layers} layers, fused{_blocks_of(model)}",
    )


def _blocks_of(model: torch.nn.Module) -> str:
    if getattr(getattr(model, "dora_config", None), "merge_aware", False):
        return "; merged weights are quantised as they will be served"
    mlps = sum(isinstance(block, FusedMlp) for block in fused_blocks(model).values())
    return f", {mlps} MLP{'s' * (mlps > 1)} as one function each" if mlps else ""


def _peft_adapter(model: PreTrainedModel, flags: Flags) -> Adapter:
    import peft

    if flags.quantize:
        keep_packing(model)  # apply_dora and patch_peft do so themselves; PEFT's own code does not
    if flags.init_adapter:
        peft_model = _load_with_peft(model, flags)
    else:
        dora = flags.dora
        config = peft.LoraConfig(
            r=dora.r,
            lora_alpha=dora.lora_alpha,
            lora_dropout=dora.lora_dropout,
            target_modules=dora.target_modules,
            exclude_modules=dora.exclude_modules,
            modules_to_save=dora.modules_to_save,
            use_rslora=dora.use_rslora,
            rank_pattern=dora.rank_pattern or {},
            alpha_pattern=dora.alpha_pattern or {},
            use_dora=flags.use_dora,
            task_type="CAUSAL_LM",
        )
        peft_model = peft.get_peft_model(model, config)
    name = "DoRA" if flags.use_dora else "LoRA"
    description = f"{name} by PEFT, not fused"
    if flags.use_dora and flags.fused:
        report = dk.patch_peft(
            peft_model, impl=flags.impl, space=flags.space, rounding=flags.rounding, blocks=flags.blocks
        )
        description = f"DoRA by PEFT, {len(report.fused)} layers fused{_blocks_of(peft_model)}"
        for path, reason in report.skipped.items():
            description += f"\n  {path} is left to PEFT: {reason}"

    def read(folder: Path) -> None:
        peft.set_peft_model_state_dict(peft_model, peft.load_peft_weights(str(folder), device="cpu"))

    return Adapter(
        peft_model,
        write=lambda folder: peft_model.save_pretrained(str(folder)),
        read=read,
        description=description,
    )


def _load_with_peft(model: PreTrainedModel, flags: Flags) -> torch.nn.Module:
    """The model with the adapter of `--init_adapter`, every tensor of it. PEFT itself accepts missing tensors.

    Raises:
        FileNotFoundError, ValueError: a damaged adapter, or one of another kind or base model.
    """
    import peft

    folder = Path(flags.init_adapter)
    if carries_digests(folder / WEIGHTS_NAME):
        check_files(folder)
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        uses_dora = getattr(config, "use_dora", None)
        if uses_dora == flags.use_dora:
            peft_model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
            stored, loaded = peft.load_peft_weights(str(folder), "cpu"), peft.get_peft_model_state_dict(peft_model)
    except Exception as error:  # damaged files raise errors of any class
        raise ValueError(f"`--init_adapter` {folder} cannot be loaded by PEFT: {error}") from error
    if uses_dora != flags.use_dora:
        if uses_dora is None:
            raise ValueError(f"`--init_adapter` {folder} is neither LoRA nor DoRA: it cannot be continued here")
        kind, wanted = ("DoRA", "--use_dora") if uses_dora else ("plain LoRA", "--no_use_dora")
        raise ValueError(f"`--init_adapter` {folder} is {kind}: continue it with {wanted}")
    # PEFT stores the weight of an adapted head or embedding too; `save_adapter` does not.
    if differing := sorted(name for name in stored.keys() ^ loaded.keys() if ".base_layer." not in name):
        raise ValueError(
            f"`--init_adapter` {folder} does not fit the model: {differing[0]} is in one of the two only; is this the "
            "base model that it was trained with?"
        )
    for name in stored.keys() & loaded.keys():
        if not torch.isfinite(loaded[name]).all() or not stored[name].is_floating_point():
            raise ValueError(f"`--init_adapter` {folder}: {name} holds NaN, infinity or no floating-point numbers")
    scalings = (module.scaling.values() for module in peft_model.modules() if hasattr(module, "lora_A"))
    if not all(map(math.isfinite, chain.from_iterable(scalings))):
        raise ValueError(f"`--init_adapter` {folder}: lora_alpha should be a number, and so should alpha_pattern's")
    return peft_model
