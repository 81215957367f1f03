"""The processes of a run. The main process prints and writes files.

`torchrun` and `accelerate launch` start them; accelerate describes them as `PartialState`. A process that was started
alone is the main process. All processes share one file system.
"""

import gc

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, get_int_from_env


def join(device: torch.device) -> PartialState:
    """Join the process group, and wait for the other processes."""
    return PartialState(cpu=device.type == "cpu")


def leave(failed: bool) -> None:
    """Destroy the process group. The last call of a process, once it holds no trainer and no model.

    gloo's threads end with the group. A thread that is left may free a tensor while the interpreter shuts down, and
    Python before 3.14 then aborts the process.
    """
    # NCCL waits for the other processes, and they may wait for the one that failed. `torchrun` ends them.
    if failed and dist.get_backend() != dist.Backend.GLOO:
        return
    # A trainer and its model are cycles, which hold the group.
    gc.collect()
    dist.destroy_process_group()


def local_rank() -> int | None:
    """The number of this process on its machine, or None if it was started alone."""
    rank = get_int_from_env(["LOCAL_RANK"], -1)
    return None if rank < 0 else rank


def local_processes() -> int | None:
    """How many processes of the run this machine has, or None if this one was started alone."""
    count = get_int_from_env(["LOCAL_WORLD_SIZE"], -1)
    return None if count < 0 else count


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
