"""Parameters that FSDP2 shards: each process holds a part, a `DTensor`, and what is saved is the whole.

What gathers is called by all processes together, as each of them has a part to give.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of all processes together; a plain tensor is that already."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole `tensor`, cut as `parameter` is; scalars are not cut."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    # Every process has read the whole, so none has to send it.
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


@contextmanager
def whole_adapter(model: nn.Module, keep: bool) -> Iterator[None]:
    """Inside the scope the trained parameters are whole and on the CPU in the processes that `keep` them.

    The frozen ones stay parts: an adapter's files do not hold them. Nothing may run forward in the scope.
    """
    parts = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and isinstance(parameter, DTensor)
    ]
    try:
        for module, name, parameter in parts:
            gathered = parameter.detach().full_tensor()
            if keep:
                module._parameters[name] = nn.Parameter(gathered.cpu())
        yield
    finally:
        for module, name, parameter in parts:
            module._parameters[name] = parameter
