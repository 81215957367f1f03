"""TRL's trainers for preferences, resumable: DPO, KTO and ORPO."""

from dataclasses import fields
from importlib import import_module

from transformers import TrainingArguments

from .resumable import Resumable

TASKS = {
    "dpo": ("trl", "DPOTrainer", "DPOConfig"),
    "kto": ("trl", "KTOTrainer", "KTOConfig"),
    "orpo": ("trl.experimental.orpo", "ORPOTrainer", "ORPOConfig"),
}


def config_class(task: str) -> type[TrainingArguments]:
    """The configuration of TRL's trainer."""
    module, _, config = TASKS.get(task, ("trl", "", "SFTConfig"))
    return getattr(import_module(module), config)


def trainer_class(task: str) -> type[Resumable]:
    """TRL's trainer with our checkpoints."""
    module, trainer, _ = TASKS[task]
    base = getattr(import_module(module), trainer)
    return type(f"Resumable{trainer}", (Resumable, base), {"__doc__": f"TRL's {trainer}, resumable."})


def known(config: type[TrainingArguments], values: dict) -> dict:
    """The values whose names are fields of a configuration; packing for one is of SFTConfig alone."""
    names = {field.name for field in fields(config)}
    return {name: value for name, value in values.items() if name in names}
