"""The adapters of fused experts in an adapter's file: A and B as PEFT lays them out, and m, for which PEFT has nothing.

PEFT wraps a module once for each of its adapted parameters, the first one innermost. A is [E r, in] there, B [out, r E]
with the experts side by side in each column of the rank. m is [E, out] under the key that linear layers have for it.
"""

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..config import DoraConfig
from ..layers.experts import DoraExperts, adapted_experts
from ..models.expert_targets import check_parameters, expert_rank_and_alpha
from ..models.modules import listed

MAGNITUDE = "lora_magnitude_vector"
HEADER = {"dora_kernels.expert_magnitude": f"{MAGNITUDE} [experts, out_features] beside expert lora_A and lora_B"}
"""What a file with such adapters says of m, in its metadata."""


def expert_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' values by PEFT's keys, without their prefix. B is a copy, in PEFT's layout."""
    return {
        key: tensor
        for prefix, adapter in wrapped_experts(model)
        for key, tensor in {
            f"{prefix}.lora_A.weight": adapter.lora_A.flatten(0, 1),
            f"{prefix}.lora_B.weight": adapter.lora_B.permute(1, 2, 0).flatten(1),
            f"{prefix}.{MAGNITUDE}": adapter.magnitude,
        }.items()
    }


@torch.no_grad()
def copy_experts(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts a file's values into the adapters."""
    for prefix, adapter in wrapped_experts(model):
        experts, out_features, r = adapter.lora_B.shape
        adapter.lora_A.copy_(tensors[f"{prefix}.lora_A.weight"].view_as(adapter.lora_A))
        lora_B = tensors[f"{prefix}.lora_B.weight"].reshape(out_features, r, experts)
        adapter.lora_B.copy_(lora_B.permute(2, 0, 1))
        adapter.magnitude.copy_(tensors[f"{prefix}.{MAGNITUDE}"])


def planned_experts(model: nn.Module, config: DoraConfig) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of what `expert_tensors` will return once `config` is applied."""
    planned = {}
    for path, (module, names) in check_parameters(model, config).items():
        for name, prefix in zip(names, _prefixes(path, len(names))):
            experts, *shape = getattr(module, name).shape
            out_features, in_features = reversed(shape) if module.is_transposed else shape
            r, _ = expert_rank_and_alpha(config, f"{path}.{name}", module)
            planned[f"{prefix}.lora_A.weight"] = [experts * r, in_features], torch.float32
            planned[f"{prefix}.lora_B.weight"] = [out_features, r * experts], torch.float32
            planned[f"{prefix}.{MAGNITUDE}"] = [experts, out_features], torch.float32
    return planned


def warn_of_experts(model: nn.Module) -> None:
    """Warns that PEFT cannot load them."""
    if stacks := adapted_experts(model):
        warnings.warn(
            f"PEFT has no DoRA for stacks of experts and cannot load this adapter ({len(stacks)} of them: "
            f"{listed(stacks, most=1)}); dora_kernels.load_adapter does, and merge_dora needs no PEFT",
            stacklevel=3,
        )


def wrapped_experts(model: nn.Module) -> Iterator[tuple[str, DoraExperts]]:
    """Each adapter with the module that PEFT puts its factors in."""
    modules: dict[str, list[DoraExperts]] = {}
    for name, adapter in adapted_experts(model).items():
        modules.setdefault(name.rpartition(".")[0], []).append(adapter)
    for path, adapters in modules.items():
        yield from zip(_prefixes(path, len(adapters)), adapters)


def _prefixes(path: str, count: int) -> list[str]:
    """Of each adapted parameter of a module, in order, the module that PEFT puts its factors in."""
    return [path + ".base_layer" * (count - 1 - index) for index in range(count)]
