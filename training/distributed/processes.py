"""The processes of a run: which of them speaks and writes, and what all of them agree on.

`torchrun` and `accelerate launch` start them, and accelerate knows them as `PartialState`. A process that was started
alone is the main one and agrees with itself. All of them read and write one file system.
"""

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, get_int_from_env


def join(device: torch.device) -> PartialState:
    """This process among the others, for which it waits."""
    return PartialState(cpu=device.type == "cpu")


def local_rank() -> int | None:
    """The number of this process on its machine, or None if it was started alone."""
    rank = get_int_from_env(["LOCAL_RANK"], -1)
    return None if rank < 0 else rank


def gathered(value) -> list:
    """The value of each process, in their order. All of them must call it, and all get the same list."""
    return gather_object([value]) if PartialState().num_processes > 1 else [value]


def of_main(value):
    """The main process's value. All of them must call it."""
    return broadcast_object_list([value])[0] if PartialState().num_processes > 1 else value
