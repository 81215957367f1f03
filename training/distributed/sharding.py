"""Parameters that FSDP2 shards: each process holds a shard, a `DTensor`; files hold full tensors.

Gathering is collective: all processes must call it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The gathered tensor; a plain tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's shard of a full `tensor`, sharded as `parameter` is. Scalars are not sharded."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    # Every process has read the full tensor, so no process has to send it.
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


@contextmanager
def full_adapter(model: nn.Module, keep: bool) -> Iterator[None]:
    """Inside the scope, processes with `keep` hold the trained parameters as full tensors on the CPU.

    Frozen parameters stay sharded: adapter files do not hold them. No forward may run inside the scope.
    """
    shards = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and isinstance(parameter, DTensor)
    ]
    try:
        for module, name, parameter in shards:
            gathered = parameter.detach().full_tensor()
            if keep:
                module._parameters[name] = nn.Parameter(gathered.cpu())
        yield
    finally:
        for module, name, parameter in shards:
            module._parameters[name] = parameter
