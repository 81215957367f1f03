"""`--set name=value`: fields of TRL's configuration that no flag decides."""

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable, Sequence

import yaml
from transformers import HfArgumentParser, TrainingArguments

# The flag that decides a field.
FLAG_OF = {
    "output_dir": "--output_dir",
    "per_device_train_batch_size": "--batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "num_train_epochs": "--num_epochs",
    "max_steps": "--max_steps",
    "learning_rate": "--learning_rate",
    "max_length": "--cutoff_len",
    "packing": "--packing",
    "assistant_only_loss": "--assistant_only_loss",
    "eval_steps": "--eval_step",
    "eval_strategy": "--eval_step",
    "save_steps": "--save_step",
    "save_strategy": "--save_step",
    "use_cpu": "--device",
    "fsdp": "--fsdp",
    "deepspeed": "--deepspeed",
    "torch_compile": "--use_compile",
    "gradient_checkpointing": "--activation_checkpointing",
    "activation_checkpointing": "--activation_checkpointing",
    "use_liger_kernel": "--use_liger",
    "report_to": "--report_to",
    "seed": "--seed",
    "data_seed": "--seed",
    "push_to_hub": "--push_to_hub",
    "hub_model_id": "--hub_model_id",
    "resume_from_checkpoint": "--resume",
    "trust_remote_code": "--trust_remote_code",
    "metric_for_best_model": "--early_stopping",
    "greater_is_better": "--early_stopping",
}
_REASONS = {
    "the base is in bf16 where the GPU computes in it": "bf16 fp16 bf16_full_eval fp16_full_eval",
    "the order of the rows is decided by --seed, so that a run can be resumed exactly": (
        "train_sampling_strategy shuffle_dataset dataloader_drop_last ignore_data_skip length_column_name"
    ),
    "the rows are made before the trainer sees them": (
        "dataset_kwargs dataset_text_field completion_only_loss chat_template_path eos_token pad_token truncation_mode "
        "model_init_kwargs remove_unused_columns eval_packing dataset_num_proc"
    ),
    "checkpoints have a form of their own, from which a run is resumed exactly": (
        "load_best_model_at_end save_only_model enable_jit_checkpoint save_on_each_node"
    ),
    "the command decides it": "do_train do_eval do_predict auto_find_batch_size eval_on_start disable_tqdm",
    "the launcher decides it": (
        "fsdp_config accelerator_config parallelism_config ddp_find_unused_parameters local_rank"
    ),
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}
"""Why a field cannot be set."""


def suggestion(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The nearest of the names as a question; empty if none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


@functools.cache
def config_fields() -> dict[str, dataclasses.Field]:
    """The fields of transformers' TrainingArguments, by name. Without TRL's own, whose import takes seconds."""
    return {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}


def trainer_fields(settings: Sequence[str], config: type) -> dict:
    """The values of `name=value` words by name, of the types that the dataclass `config` states. Later ones win.

    Raises:
        ValueError: no such field, one that a flag decides or that cannot be set, or a value of another type.
    """
    known = {field.name for field in dataclasses.fields(config) if field.init}
    found = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"`--set` {setting} should be name=value, such as weight_decay=0.1")
        if name in FLAG_OF:
            raise ValueError(f"`--set` {name} is decided by {FLAG_OF[name]}: use that")
        if name in REFUSED:
            raise ValueError(f"`--set` {name} cannot be set: {REFUSED[name]}")
        if name not in known:
            raise ValueError(f"`--set` {name} is no field of {config.__name__}{suggestion(name, known)}")
        found[name] = _typed(name, text, config)
    return found


def _typed(name: str, text: str, config: type):
    """The value as transformers' own parser of this configuration reads it."""
    try:
        value = _parsed(text)
        if isinstance(value, list):
            return value
        word = f"--{name}={json.dumps(value) if isinstance(value, dict) else text}"
        return getattr(_Strict(config, allow_abbrev=False).parse_args([word]), name)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"`--set` {name}={text}: {str(error).partition(': ')[2] or error}") from None


def _parsed(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)  # {min_lr: 0.1} as people write it; it reads 1e-5 as a text


class _Strict(HfArgumentParser):
    """Raises an error, and does not exit."""

    def error(self, message: str) -> None:
        raise ValueError(message)
