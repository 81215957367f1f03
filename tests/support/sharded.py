"""Parameters as sharded training leaves them, in one process: each context gives what makes one of a whole tensor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


@contextmanager
def fsdp2() -> Iterator[Callable[[torch.Tensor], nn.Parameter]]:
    """A DTensor."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield lambda tensor: nn.Parameter(distribute_tensor(tensor.detach(), mesh, [Shard(0)]), requires_grad=False)
    finally:
        dist.destroy_process_group()


@contextmanager
def zero_3() -> Iterator[Callable[[torch.Tensor], nn.Parameter]]:
    """What DeepSpeed leaves outside of a forward: no element, and the shape that it has when gathered."""

    def empty(tensor):
        parameter = nn.Parameter(torch.empty(0, dtype=tensor.dtype), requires_grad=False)
        parameter.ds_shape = tensor.shape
        return parameter

    yield empty


SHARDS = (fsdp2, zero_3)
