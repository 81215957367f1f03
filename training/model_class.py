"""The class that a base model is loaded as, so that an adapter fits it.

An adapter's config names a task type, which training recipes often get wrong. Its tensors name the modules of the class
that it was trained in. So the class is the first one, of those that the config suggests, whose modules fit them.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from dora_kernels.adapters.save_load import MAGNITUDE, PREFIX

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types."""
CLASSIFICATION = ("SEQ_CLS", "TOKEN_CLS")
WRAPPERS = ("original_module", "base_layer", "modules_to_save")
"""Names inside PEFT's keys that are not modules of the model."""


@dataclass(frozen=True)
class ModelClass:
    """A class, the config to load it with, and the vocabulary of the adapter's embeddings if it is another."""

    cls: type[PreTrainedModel]
    config: PretrainedConfig
    vocabulary: int | None


def class_of(fields: dict, config: PretrainedConfig, stored: dict[str, tuple[int, ...]]) -> ModelClass:
    """The class in which an adapter fits.

    Args:
        fields: its adapter_config.json.
        config: the base model's.
        stored: the shapes of its tensors, by PEFT's keys.

    Raises:
        ValueError: it fits none.
    """
    tried = []
    for cls in _candidates(fields, config):
        for labels in _label_counts(fields, stored):
            own = copy.deepcopy(config)
            if labels:
                own.num_labels = labels
            try:
                with torch.device("meta"):
                    model = cls(own)
            except Exception as error:  # a class that this config lacks fields for, or a package
                misfit = f"place for this config ({error})"
                continue
            misfit = _misfit(model, stored)
            if misfit is None:
                return ModelClass(cls, own, _vocabulary(model, stored))
        tried.append(f"{cls.__name__} has no {misfit}")
    raise ValueError(
        f"the adapter does not fit the model: {'; '.join(tried) or f'no class for {config.model_type}'}. Is this the "
        "base model that it was trained with?"
    )


def _candidates(fields: dict, config: PretrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """By the task type, by the class that PEFT noted, by the base's architecture, and what is left."""
    task = fields.get("task_type")
    noted = (fields.get("auto_mapping") or {}).get("base_model_class")
    named = [noted, *(config.architectures or [])]
    autos = [AUTO_CLASSES.get(task), "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText"]
    by_task = [_concrete(AUTO_CLASSES[task], config)] if task in AUTO_CLASSES else []
    by_name = [getattr(transformers, name, None) for name in named if name]
    classes = [*by_task, *by_name, *(_concrete(auto, config) for auto in autos if auto), _concrete("AutoModel", config)]
    return iter(dict.fromkeys(cls for cls in classes if isinstance(cls, type) and issubclass(cls, PreTrainedModel)))


def _concrete(auto: str, config: PretrainedConfig) -> type | None:
    """The class that an Auto class makes of this config."""
    found = getattr(transformers, auto, AutoModel)._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _label_counts(fields: dict, stored: dict[str, tuple[int, ...]]) -> list[int]:
    """How many labels a classifier may have, by the tensors that are not LoRA's; 0 for the config's own number."""
    if fields.get("task_type") not in CLASSIFICATION:
        return [0]
    heads = {shape[0] for key, shape in stored.items() if not _is_lora(key) and len(shape) in (1, 2)}
    return [0, *sorted(heads)]


def _misfit(model: nn.Module, stored: dict[str, tuple[int, ...]]) -> str | None:
    """The first tensor of the adapter that has no place in the model, or None."""
    modules, tensors = dict(model.named_modules()), model.state_dict()
    vocabulary = {id(module) for module in _embeddings(model)}
    for key, shape in stored.items():
        path = _path(key)
        if _is_lora(key):
            weights = _adaptable(modules.get(path))
            if not any(".lora_A." not in key or shape[-1] in weight.shape for weight in weights):
                return f"{path} for {key}"
        elif path not in tensors:
            return path
        elif tuple(tensors[path].shape) != shape:
            of_vocabulary = id(modules[path.rpartition(".")[0]]) in vocabulary
            if not (of_vocabulary and tuple(tensors[path].shape[1:]) == shape[1:]):
                return f"{path} of shape {list(shape)}"
    return None


def _adaptable(module: nn.Module | None) -> list[torch.Tensor]:
    """A layer's weight, or the stacks of a module of experts."""
    weight = getattr(module, "weight", None)
    if module is None or weight is not None:
        return [] if weight is None else [weight]
    return [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]


def _vocabulary(model: PreTrainedModel, stored: dict[str, tuple[int, ...]]) -> int | None:
    """The rows of stored embeddings, if they are not as many as the base's."""
    own = {f"{path}.weight": module for path, module in model.named_modules() if module in _embeddings(model)}
    rows = {key: shape[0] for key, shape in stored.items() if _path(key) in own}
    return next((count for key, count in rows.items() if own[_path(key)].weight.shape[0] != count), None)


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The layers with a row for each word of the vocabulary."""
    try:
        found = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:
        return []
    return [module for module in found if module is not None]


def _is_lora(key: str) -> bool:
    return ".lora_" in key


def _path(key: str) -> str:
    """The module that a LoRA tensor belongs to; of another tensor its own name in the model."""
    names = [name for name in key.removeprefix(PREFIX).split(".") if name not in WRAPPERS]
    if not _is_lora(key):
        return ".".join(names)
    return ".".join(names[: next(i for i, name in enumerate(names) if name.startswith(("lora_", MAGNITUDE)))])
