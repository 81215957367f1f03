"""GPTQModel's layers of 4 bits, GPTQ and AWQ, of the classes that leave a checkpoint's packing as it is."""

import torch
from torch import nn

from .int4 import Int4Layout, Int4Weight, checked

GPTQ = Int4Layout(rows_are_outputs=False)
AWQ = Int4Layout(rows_are_outputs=False, words_along_outputs=True, interleaved=True)

LAYOUTS = {
    "TorchLinear": GPTQ,
    "TorchQuantLinear": GPTQ,
    "TritonV2Linear": GPTQ,
    "TritonV2QuantLinear": GPTQ,
    "AwqTorchLinear": AWQ,
    "AwqTorchQuantLinear": AWQ,
    "AwqGEMMLinear": AWQ,
    "AwqGEMMQuantLinear": AWQ,
    "AwqGEMMTritonLinear": AWQ,
    "AwqGEMMTritonQuantLinear": AWQ,
}
"""By the class's own name, in the library's newer and older versions: its subclasses may pack in another way."""


def recognises(module: nn.Module) -> bool:
    return isinstance(getattr(module, "qweight", None), torch.Tensor) and hasattr(module, "qzeros")


def read(module: nn.Module, nf4_parity: bool) -> Int4Weight:
    name = type(module).__name__
    layout = LAYOUTS.get(name)
    if layout is None:
        raise ValueError(
            f"a {name} packs its weight for one kernel: load the model with a backend that keeps the checkpoint's "
            'packing, GPTQConfig(backend="gptq_torch") or AwqConfig(backend="torch_awq")'
        )
    if module.bits != 4:
        raise ValueError(f"this {name} has {module.bits} bits: integers of 4 bits are known here")
    shape = torch.Size((module.out_features, module.in_features))
    group = module.group_size if module.group_size > 0 else shape[1]
    if _format_of(module) == "gptq" and module.qzero_format() != 2:
        raise ValueError(f"the zeros of this {name} are one too small: the library converts them after loading")
    weight = Int4Weight(
        module.qweight.detach(),
        module.scales.detach(),
        module.qzeros.detach(),
        _groups(module, group) if layout is GPTQ else None,
        group,
        shape,
        layout,
    )
    return checked(weight, name)


def _format_of(module: nn.Module) -> str | None:
    form = getattr(module, "format", None)
    return getattr(form, "value", form)


def _groups(module: nn.Module, group: int) -> torch.Tensor | None:
    """Each input feature's group, None where groups lie side by side: looked up once, for a GPU would have to wait."""
    groups = getattr(module, "g_idx", None)
    if groups is None:
        raise ValueError(f"this {type(module).__name__} has no `g_idx`, which says each input feature's group")
    if groups.is_meta:
        return groups
    if "groups_lie_side_by_side" not in vars(module):
        if not 0 <= int(groups.min()) <= int(groups.max()) < len(module.scales):
            raise ValueError(f"the `g_idx` of this {type(module).__name__} names groups that have no scales")
        expected = torch.arange(len(groups), device=groups.device) // group
        module.groups_lie_side_by_side = torch.equal(groups, expected.to(groups.dtype))
    return None if module.groups_lie_side_by_side else groups
