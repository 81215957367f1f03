"""The flags of a run as TRL's `SFTConfig`."""

import warnings

import torch
from transformers import TrainingArguments

from ..distributed.launchers import launched_with_fsdp, zero_config
from ..flags import Flags
from ..flags.trainer_fields import trainer_fields
from ..model.base_model import compute_dtype
from .preference import config_class, known

WEIGHT_DECAY = 0.01
EVAL_BATCH = 8  # rows, at least: an evaluation keeps no activations


def trainer_config(flags: Flags, *, eval_step: int, resumed: bool) -> TrainingArguments:
    """TRL's configuration of the task, with the fields of `--set`.

    Args:
        eval_step: steps between evaluations; 0 for none.
        resumed: training starts from a checkpoint.

    Raises:
        ValueError: a field of `--set` that cannot be set, or to this value.
    """
    with warnings.catch_warnings():
        # TRL sets it by default under its old name, so it must be set under that name.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        cls = config_class(flags.task)
        config = cls(**known(cls, _decided(flags, eval_step, resumed)) | trainer_fields(flags.set, cls))
    if config.device.type == "cuda" and config.parallel_mode.value == "not_distributed":
        # Several GPUs may be visible where one is asked for; TRL refuses nn.DataParallel. There is no argument for
        # this; transformers sets it itself for a model that is spread over devices.
        config._n_gpu = 1
    # If `bf16` is False, transformers would take the mixed precision that `accelerate launch` was configured with.
    config.mixed_precision = "bf16" if config.bf16 else "no"
    return config


def _decided(flags: Flags, eval_step: int, resumed: bool) -> dict:
    """The fields that flags decide, and defaults of our own."""
    return {
        "output_dir": flags.output_dir,
        "per_device_train_batch_size": flags.batch_size,
        "per_device_eval_batch_size": max(flags.batch_size, EVAL_BATCH),
        "gradient_accumulation_steps": flags.gradient_accumulation_steps,
        "num_train_epochs": flags.num_epochs,
        "max_steps": flags.max_steps or -1,
        "learning_rate": flags.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": flags.warmup_ratio,
        "weight_decay": WEIGHT_DECAY,
        "max_length": flags.cutoff_len,
        "packing": flags.packing,
        "eval_packing": False,
        "eval_strategy": "steps" if eval_step else "no",
        "eval_steps": eval_step or None,
        # The base model's loss; a resumed run has measured it already.
        "eval_on_start": bool(eval_step) and not resumed,
        "save_strategy": "steps" if flags.save_step else "no",
        "save_steps": flags.save_step or 500,
        "logging_steps": 1,
        "disable_tqdm": False,
        "logging_nan_inf_filter": False,
        # `training.distributed.launchers` says why FSDP and DeepSpeed get no autocast.
        "bf16": compute_dtype(flags.torch_device) == torch.bfloat16 and not (flags.fsdp or flags.deepspeed),
        # `accelerate launch` passes its own FSDP configuration to transformers.
        "fsdp": (flags.fsdp and not launched_with_fsdp()) or None,
        "deepspeed": zero_config(flags.deepspeed) if flags.deepspeed else None,
        "use_cpu": flags.torch_device.type == "cpu",
        # Every parameter of an adapter is used in every step.
        "ddp_find_unused_parameters": False,
        "torch_compile": flags.use_compile,
        "gradient_checkpointing": flags.activation_checkpointing,
        "report_to": flags.trackers,
        "metric_for_best_model": "eval_loss" if eval_step and flags.early_stopping else None,
        "restore_callback_states_from_checkpoint": bool(flags.early_stopping),
        "seed": flags.seed,
    }
