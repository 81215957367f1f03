"""A tiny base model, adapters of it and rows to train on, kept until the process ends."""

import functools
import tempfile
from pathlib import Path


@functools.cache
def base_folder() -> Path:
    from tests.support.training_runs import one_layer_base

    return one_layer_base(keep() / "base")


@functools.cache
def adapter_folder() -> Path:
    import dora_kernels as dk

    dk.save_adapter(model(1), keep() / "adapter")
    return keep() / "adapter"


@functools.cache
def rows_file() -> Path:
    from tests.support.training_runs import demo_rows, write_rows

    return write_rows(keep() / "rows.jsonl", demo_rows(30))


@functools.cache
def keep() -> Path:
    """A folder until the process ends."""
    keep.folder = tempfile.TemporaryDirectory()
    return Path(keep.folder.name)


def base():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_folder())


@functools.cache
def model(step: int):
    """An adapted base whose values tell the step; its rank is the step's from 5 on, else 2."""
    import torch

    import dora_kernels as dk

    torch.manual_seed(step)
    adapted = dk.apply_dora(base(), dk.DoraConfig(r=step if step >= 5 else 2, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapted
