"""The processes of a run: which of them speaks and writes, what all of them agree on, which engines they run on.

`torchrun` and `accelerate launch` start them, and accelerate knows them as `PartialState`. A process that was started
alone is the main one and agrees with itself. All of them read and write one file system.
"""

import torch
from accelerate import PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
    get_int_from_env,
    parse_flag_from_env,
)

INSTEAD = "use DDP, `torchrun --nproc_per_node N -m training ...`"


def join(device: torch.device) -> PartialState:
    """This process among the others, for which it waits. Raises ValueError, before that, for an unsupported engine."""
    check_engine(device)
    return PartialState(cpu=device.type == "cpu")


def local_rank() -> int | None:
    """The number of this process on its machine, or None if it was started alone."""
    rank = get_int_from_env(["LOCAL_RANK"], -1)
    return None if rank < 0 else rank


def check_engine(device: torch.device) -> None:
    """Raise ValueError if `accelerate launch` was asked for what does not work here, with what to do instead."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if FullyShardedDataParallelPlugin().fsdp_version == 1:
            reason = (
                "FSDP1 flattens parameters into buffers of one dtype, where fp32 adapters on a bf16 base do not fit"
            )
        elif device.type == "cpu":
            reason = "on a CPU accelerate runs DDP when it is asked for FSDP2, without saying so"
        else:
            reason = "this command does not yet write checkpoints of a model that FSDP2 shards"
        raise ValueError(f"{reason}: {INSTEAD}; `fully_shard` around the decoder layers works in a loop of your own")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        if DeepSpeedPlugin().zero_stage == 3:
            reason = "ZeRO-3 leaves a layer's parameters empty, and no norm can be taken of them"
        else:
            reason = "what DeepSpeed would shard, an adapter's gradients and moments, is small"
        raise ValueError(f"{reason}: {INSTEAD}")


def gathered(value) -> list:
    """The value of each process, in their order. All of them must call it, and all get the same list."""
    return gather_object([value]) if PartialState().num_processes > 1 else [value]


def of_main(value):
    """The main process's value. All of them must call it."""
    return broadcast_object_list([value])[0] if PartialState().num_processes > 1 else value
