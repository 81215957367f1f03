"""The processes of a run: which of them speaks and writes, what all of them agree on, which engines they run on.

`torchrun` and `accelerate launch` start them, and accelerate knows them as `PartialState`. A process that was started
alone is the main one and agrees with itself. All of them read and write one file system.
"""

import torch
from accelerate import PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
    get_int_from_env,
    parse_choice_from_env,
    parse_flag_from_env,
)
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

DDP = "use DDP, `torchrun --nproc_per_node N -m training ...`"


def join(device: torch.device) -> PartialState:
    """This process among the others, for which it waits."""
    return PartialState(cpu=device.type == "cpu")


def local_rank() -> int | None:
    """The number of this process on its machine, or None if it was started alone."""
    rank = get_int_from_env(["LOCAL_RANK"], -1)
    return None if rank < 0 else rank


def launched_with_fsdp() -> bool:
    """Whether `accelerate launch` was configured for FSDP. Raises ValueError for what does not work here of it."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP1 flattens parameters into buffers of one dtype, where fp32 adapters on a bf16 base do not fit: "
            "set `fsdp_version: 2` in accelerate's configuration"
        )
    fits = {
        # Around single linears the norm would be of a weight in parts.
        "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP": plugin.auto_wrap_policy is transformer_auto_wrap_policy,
        # It forgets the generators, so that dropout differs in the recomputation: use --activation_checkpointing.
        "fsdp_activation_checkpointing: false": not plugin.activation_checkpointing,
        "fsdp_offload_params: false": not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
    }
    if others := [line for line, as_is in fits.items() if not as_is]:
        raise ValueError(f"accelerate's FSDP configuration should have `{'`, `'.join(others)}`")
    return True


def check_precision(dtype: torch.dtype) -> None:
    """Raise ValueError if `accelerate launch` was asked to compute in another dtype than the base will have."""
    asked = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16" if dtype == torch.bfloat16 else "no"):
        raise ValueError(f"accelerate was asked for {asked}, but the base will be in {str(dtype)[6:]}: leave it out there")


def check_sharding(device: torch.device) -> None:
    """Raise ValueError if FSDP2 cannot shard over these processes, with what to do instead."""
    if device.type == "cpu":
        raise ValueError(f"on a CPU accelerate runs DDP when it is asked for FSDP2, without saying so: {DDP}")
    if local_rank() is None:
        raise ValueError("FSDP shards over several processes: `torchrun --nproc_per_node N -m training --fsdp ...`")


def gathered(value) -> list:
    """The value of each process, in their order. All of them must call it, and all get the same list."""
    return gather_object([value]) if PartialState().num_processes > 1 else [value]


def of_main(value):
    """The main process's value. All of them must call it."""
    return broadcast_object_list([value])[0] if PartialState().num_processes > 1 else value
