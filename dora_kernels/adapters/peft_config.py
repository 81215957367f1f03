"""`adapter_config.json`, PEFT's file: written from a model, read into a `DoraConfig`."""

import json
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from torch import nn

from ..config import DoraConfig
from ..layers.experts import adapted_experts
from ..layers.linear import DoraLinear
from ..models.heads import HEADS, head_task, trains_head
from ..models.modules import dora_layers, listed
from ..models.peft_names import misread_by_peft
from ..models.targets import is_all_linear

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

HONOURED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "target_parameters",
)
OURS = ("merge_aware",)
"""What the engine adds where it is on: PEFT passes over it, with a warning, and loads the same adapter."""
# Fields that say where the adapter came from or how it was initialised, not what it computes.
IRRELEVANT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "use_dora",
)
# The other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the base weights, before the adapter.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def adapter_fields(model: nn.Module) -> dict:
    """The fields of PEFT's `LoraConfig` that describe a patched model's adapter."""
    config, layers = model.dora_config, dora_layers(model)
    # The paths, as PEFT writes them: "all-linear" might mean other layers of another model class.
    targets = sorted(layers) if is_all_linear(config.target_modules) else config.target_modules
    linear = [layer for layer in layers.values() if isinstance(layer, DoraLinear)]
    task_type = _task_type(model)
    # PEFT has no field for a divided rank: its own pattern says each stack's.
    divided = adapted_experts(model) if config.expert_rank == "active" else {}
    fields = {name: getattr(config, name) for name in HONOURED} | {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "use_dora": True,
        "bias": "none",
        "target_modules": targets,
        "rank_pattern": {name: experts.r for name, experts in divided.items()} | (config.rank_pattern or {}),
        "alpha_pattern": config.alpha_pattern or {},
        "fan_in_fan_out": bool(linear) and all(layer.fan_in_fan_out for layer in linear),
    }
    fields |= {name: True for name in OURS if getattr(config, name)}
    if task_type is None:
        fields["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return fields


def write_config(fields: dict, directory: Path) -> None:
    """Writes the file: through PEFT's own `LoraConfig` where PEFT is installed, else with these fields alone."""
    try:
        from peft import LoraConfig
    except ImportError:
        (directory / CONFIG_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
    else:
        own = {name: value for name, value in fields.items() if name in OURS}
        config = LoraConfig(**{name: value for name, value in fields.items() if name not in OURS})
        # PEFT holds them as sets and would write them in random order.
        config.target_modules, config.exclude_modules = fields["target_modules"], fields["exclude_modules"]
        config.save_pretrained(str(directory))
        if own:
            path = directory / CONFIG_NAME
            written = json.loads(path.read_text(encoding="utf-8")) | own
            path.write_text(json.dumps(written, indent=2, sort_keys=True), encoding="utf-8")


def warn_of_misread(model: nn.Module) -> None:
    """Warns of adapted layers whose tensors the installed PEFT cannot load."""
    if misread := misread_by_peft(model, dora_layers(model)):
        warnings.warn(
            f"the installed PEFT cannot load the adapters of {len(misread)} layers ({listed(misread)}): in a "
            f"{model.config.model_type} model it takes their names for what older releases called so; "
            "dora_kernels.load_adapter reads them all",
            stacklevel=3,
        )


def read_config(directory: Path, keys: Iterable[str] | None = None) -> DoraConfig:
    """The adapter's configuration, refused where it says anything that this engine would not do.

    Args:
        keys: those of the file of weights, where it is not yet written.

    Raises:
        ValueError: not JSON, not a DoRA adapter, or a feature that is not implemented, by name.
    """
    path = directory / CONFIG_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} should hold a JSON object, got {type(fields).__name__}")
    if fields.get("peft_type") != "LORA":
        raise ValueError(f'{path}: peft_type should be "LORA", got {fields.get("peft_type")!r}: not a DoRA adapter')
    if fields.get("use_dora") is not True:
        raise ValueError(f"{path}: use_dora is {fields.get('use_dora')!r}: a plain LoRA adapter; load it with PEFT")
    if fields.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias={fields['bias']!r} is not supported, only adapters with bias='none' are")
    if (init := fields.get("init_lora_weights")) not in INITIALISATIONS:
        raise ValueError(
            f"{path}: init_lora_weights={init!r} changed the base weights before training; convert the adapter with "
            "PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    fields = _completed(fields, directory, keys)
    known = (*HONOURED, *OURS, *IRRELEVANT, "bias", "init_lora_weights")
    # Fields of any PEFT version, later ones included, are off when null, false or empty.
    unsupported = {name: value for name, value in fields.items() if name not in known and value}
    if unsupported:
        listed = ", ".join(f"{name}={value!r}" for name, value in unsupported.items())
        raise ValueError(f"{path}: not supported by this engine, or unknown: {listed[:300]}")
    missing = [name for name in ("r", "lora_alpha", "target_modules") if fields.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    try:
        return DoraConfig.from_dict({name: fields[name] for name in (*HONOURED, *OURS) if fields.get(name) is not None})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _completed(fields: dict, directory: Path, keys: Iterable[str] | None) -> dict:
    """The fields with what only the file of weights says: the layers that `layers_to_transform` left, and heads."""
    heads = HEADS.get(fields.get("task_type"), ())
    if fields.get("layers_to_transform") is None and not heads:
        return fields
    keys = _stored_keys(directory) if keys is None else keys
    completed = dict(fields)
    if fields.get("layers_to_transform") is not None:
        layers = sorted(key.partition(".lora_A.")[0].removeprefix(PREFIX) for key in keys if ".lora_A." in key)
        _check_numbers(fields["layers_to_transform"], layers, directory)
        completed |= {"target_modules": layers, "layers_to_transform": None, "layers_pattern": None}
    stored = [head for head in heads if any(f".{head}." in key for key in keys)]
    if stored:
        completed["modules_to_save"] = list(dict.fromkeys([*(fields.get("modules_to_save") or ()), *stored]))
    return completed


def _check_numbers(numbers: int | list[int], layers: list[str], directory: Path) -> None:
    """Raises ValueError for a stored layer that has none of the numbers of `layers_to_transform` in its path."""
    wanted = {str(number) for number in (numbers if isinstance(numbers, list) else [numbers])}
    for layer in layers:
        if not wanted & set(layer.split(".")):
            raise ValueError(
                f"{directory / CONFIG_NAME}: layers_to_transform={numbers!r} leaves out {layer}, which "
                f"{WEIGHTS_NAME} holds: the two files do not belong together"
            )


def _stored_keys(directory: Path) -> list[str]:
    path = directory / WEIGHTS_NAME
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except Exception as error:  # The reader raises whatever the damage leads to.
        raise ValueError(f"{path} is missing, truncated or corrupt: {error}") from error


def without_absent_modules(config: DoraConfig, names: list[str]) -> DoraConfig:
    """`config` without the entries that match none of the modules called `names`: PEFT lists what other models have
    ("classifier" and "score"), where a config of the user's own must match."""
    targets, saved = config.target_modules, config.modules_to_save
    if not isinstance(targets, str):
        targets = [entry for entry in targets if any(f".{name}".endswith(f".{entry}") for name in names)]
    if saved is not None:
        saved = [entry for entry in saved if any(name.endswith(entry) for name in names)] or None
    # With no target left the error about them all is the right one.
    return replace(config, target_modules=targets or config.target_modules, modules_to_save=saved)


def _task_type(model: nn.Module) -> str | None:
    """PEFT's task type where it changes nothing but the wrapper's class, or trains the head that trains here too."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        # The wrappers of these types pass `input_ids` on: a speech model would get it beside its features.
        return None
    if (task := head_task(model)) is not None:
        return task if trains_head(model, model.dora_config) else None
    if getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") else None
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None
