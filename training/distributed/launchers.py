"""What a run in several processes supports besides DDP: FSDP2, and DeepSpeed's ZeRO stages 1 and 2.

accelerate runs both. Their own mixed precision stays off: it would round the fp32 adapters and magnitudes to 16 bits.
With a base in bf16 the layers compute in bf16 themselves.
"""

import json
from pathlib import Path

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, parse_choice_from_env, parse_flag_from_env
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from .processes import local_rank

PACKAGE = __package__.partition(".")[0]
DDP = f"`torchrun --nproc_per_node N -m {PACKAGE} ...` runs DDP"


def launched_with_fsdp() -> bool:
    """Whether `accelerate launch` was configured for FSDP2.

    Raises:
        ValueError: FSDP1, or an FSDP2 setting that is not supported.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP1 flattens parameters into buffers of one dtype, where fp32 adapters on a bf16 base do not fit: "
            "set `fsdp_version: 2` in accelerate's configuration"
        )
    supported = {
        # Wrapped alone, a linear layer's weight would be sharded when its norm is computed.
        "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP": plugin.auto_wrap_policy is transformer_auto_wrap_policy,
        "fsdp_offload_params: false": not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        # It does not restore the random generators for dropout; --activation_checkpointing does.
        "fsdp_activation_checkpointing: false": not plugin.activation_checkpointing,
    }
    if wrong := [line for line, holds in supported.items() if not holds]:
        raise ValueError(f"accelerate's FSDP configuration should have `{'`, `'.join(wrong)}`")
    return True


def check_launcher(dtype: torch.dtype) -> None:
    """Raise ValueError if `accelerate launch` was configured for DeepSpeed, or for another dtype than the base's."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(f"DeepSpeed is configured by a flag: `torchrun ... -m {PACKAGE} --deepspeed config.json ...`")
    precision = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16" if dtype == torch.bfloat16 else "no"):
        raise ValueError(
            f"accelerate was asked for mixed precision in {precision}, "
            f"but the base is in {str(dtype)[6:]}: leave it out"
        )


def check_sharding(flag: str, device: torch.device) -> None:
    """Raise ValueError if `flag`, "fsdp" or "deepspeed", cannot work with these processes on this device."""
    if device.type == "cpu":
        raise ValueError(f"`--{flag}` needs GPUs (on a CPU accelerate runs DDP in its place, without a word): {DDP}")
    if local_rank() is None:
        raise ValueError(f"`--{flag}` shards over processes: `torchrun --nproc_per_node N -m {PACKAGE} --{flag} ...`")


def zero_config(path: str) -> dict:
    """DeepSpeed's configuration from the JSON file `path`. Settings that flags decide become "auto".

    Raises:
        ValueError: the file cannot be read, or holds a setting that is not supported.
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
    # Left out, they would default to no accumulation and no clipping.
    ours = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict.fromkeys(ours, "auto") | config
