"""What a run in several processes may ask for besides DDP: FSDP2, or DeepSpeed's ZeRO below stage 3.

Both are accelerate's. Neither may compute in 16 bits by its own rules, which would round the fp32 adapters, magnitudes
among them; with a base in bf16 the layers do it by theirs.
"""

import json
from pathlib import Path

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, parse_choice_from_env, parse_flag_from_env
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from .processes import local_rank

DDP = "`torchrun --nproc_per_node N -m training ...` runs DDP"


def launched_with_fsdp() -> bool:
    """Whether `accelerate launch` was configured for FSDP2. Raises ValueError for what does not work here of it."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP1 flattens parameters into buffers of one dtype, where fp32 adapters on a bf16 base do not fit: "
            "set `fsdp_version: 2` in accelerate's configuration"
        )
    fits = {
        # Around single linears a norm would be of a weight in parts.
        "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP": plugin.auto_wrap_policy is transformer_auto_wrap_policy,
        "fsdp_offload_params: false": not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        # It does not restore the generators for dropout; --activation_checkpointing does.
        "fsdp_activation_checkpointing: false": not plugin.activation_checkpointing,
    }
    if others := [line for line, as_is in fits.items() if not as_is]:
        raise ValueError(f"accelerate's FSDP configuration should have `{'`, `'.join(others)}`")
    return True


def check_launcher(dtype: torch.dtype) -> None:
    """Raise ValueError if `accelerate launch` was asked for DeepSpeed, or for another dtype than the base will have."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("DeepSpeed is configured by a flag: `torchrun ... -m training --deepspeed config.json ...`")
    asked = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16" if dtype == torch.bfloat16 else "no"):
        raise ValueError(
            f"accelerate was asked for mixed precision in {asked}, but the base is in {str(dtype)[6:]}: leave it out"
        )


def check_sharding(flag: str, device: torch.device) -> None:
    """Raise ValueError if the processes cannot run FSDP2 or DeepSpeed, which `flag` asks for."""
    if device.type == "cpu":
        raise ValueError(f"`--{flag}` needs GPUs (on a CPU accelerate runs DDP in its place, without a word): {DDP}")
    if local_rank() is None:
        raise ValueError(f"`--{flag}` shards over processes: `torchrun --nproc_per_node N -m training --{flag} ...`")


def zero_config(path: str) -> dict:
    """DeepSpeed's configuration in the JSON file `path`, with what the run's own flags decide left to them.

    Raises ValueError for what does not work here of it.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        stage = config.get("zero_optimization", {}).get("stage", 0)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"`--deepspeed` {path} is not a readable JSON object: {error}") from None
    if stage not in (1, 2):
        reason = "ZeRO-3 leaves a layer's parameters empty, and no norm can be taken of them: use --fsdp, or stage 2"
        raise ValueError(
            f"`--deepspeed` {path}: "
            + (reason if stage == 3 else f"zero_optimization.stage should be 1 or 2, got {stage}")
        )
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise ValueError(f"`--deepspeed` {path}: leave `{name}` out, magnitudes train in a group without decay")
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled") not in (None, False, "auto"):
            raise ValueError(f"`--deepspeed` {path}: leave `{name}` out, it would round the fp32 adapters")
    # DeepSpeed's own defaults are no accumulation and no clipping.
    ours = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict.fromkeys(ours, "auto") | config
