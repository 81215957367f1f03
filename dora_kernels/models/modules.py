"""Walking and changing a model's modules."""

import sys
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..layers.dora_layer import DoraLayer
from ..layers.support import REMEDY, is_offloaded
from ..ops.base_weights import is_quantized, sharding_of


def dora_layers(model: nn.Module) -> dict[str, DoraLayer]:
    """The DoRA layers of a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, DoraLayer)}


def check_model(model: nn.Module) -> None:
    """Raises for a model that cannot be patched, merged or saved: compiled, PEFT's, or with weights not loaded."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("The model is compiled: pass model._orig_mod, and compile it afterwards")
    for path, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"The model holds PEFT's {type(module).__name__}: patch_peft(model) fuses a PEFT model, "
                "model.merge_and_unload() merges it (to merge in fp32: save_pretrained it, then merge_dora what "
                "load_adapter makes of the base model); or pass the base model"
            )
        if is_offloaded(module):
            where = path or "The model"
            raise ValueError(
                f"{where} is offloaded by accelerate, so its weights are not there to be adapted; {REMEDY}"
            )
    for name, tensor in _weights(model):
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, without values; load the model's weights first")


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters, and what quantised layers hold as buffers, by name."""
    yield from model.named_parameters()
    for path, module in model.named_modules():
        if is_quantized(module):
            yield from ((f"{path}.{name}".strip("."), buffer) for name, buffer in module.named_buffers(recurse=False))


def check_not_sharded(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises ValueError, with its name, for a tensor of which this process holds a part."""
    for name, tensor in tensors:
        if sharding := sharding_of(tensor):
            raise ValueError(f"{name} is {sharding}")


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at `path`; accelerate's hook, which moves inputs between devices, moves along."""
    old = model.get_submodule(path)
    if module is old:
        return
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        hooks = sys.modules["accelerate.hooks"]
        hooks.remove_hook_from_module(old)
        hooks.add_hook_to_module(module, hook)
    model.set_submodule(path, module)


def listed(names: Iterable[str], separator: str = ", ", most: int = 5) -> str:
    """The first names in alphabetical order, and how many more there are."""
    names = sorted(names)
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more
