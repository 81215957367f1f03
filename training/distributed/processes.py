"""The processes of a run. The main process prints and writes files.

`torchrun` and `accelerate launch` start them; accelerate describes them as `PartialState`. A process that was started
alone is the main process. All processes share one file system.
"""

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, get_int_from_env


def join(device: torch.device) -> PartialState:
    """Join the process group, and wait for the other processes."""
    return PartialState(cpu=device.type == "cpu")


def local_rank() -> int | None:
    """The number of this process on its machine, or None if it was started alone."""
    rank = get_int_from_env(["LOCAL_RANK"], -1)
    return None if rank < 0 else rank


def gather(value) -> list:
    """The values of all processes, in order of rank. All processes must call it."""
    return gather_object([value]) if PartialState().num_processes > 1 else [value]


def broadcast(value):
    """The main process's value. All processes must call it."""
    return broadcast_object_list([value])[0] if PartialState().num_processes > 1 else value


def print_once(text: str) -> None:
    """Print in the main process only."""
    if PartialState().is_main_process:
        print(text)
