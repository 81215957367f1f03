"""Layers whose adapter the installed PEFT cannot load, because it takes their names for older ones.

PEFT converts what older releases of transformers named otherwise. In some families it takes today's names for those:
dense layers ("gate_proj") for experts that are fused now, for which it has no DoRA, or a part of a path
("shared_experts.") for one that was renamed since, after which the tensors fit nowhere.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping


def misread_by_peft(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """Those of the linear layers at `paths` whose adapter PEFT would not read from a file; none where it is missing."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family is None or get_checkpoint_conversion_mapping(family) is None:  # there is nothing that PEFT would convert
        return set()
    try:
        from peft import LoraConfig
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return set()

    def stays(leaf: str) -> bool:
        config = LoraConfig(target_modules=[leaf])
        try:
            conversion.convert_peft_config_for_transformers(config, model, conversions=None)
        except ValueError:  # it stands for a part of a fused parameter
            return False
        return not config.target_parameters

    paths = set(paths)
    try:
        kept = {leaf for leaf in {path.rpartition(".")[2] for path in paths} if stays(leaf)}
        keys = {f"base_model.model.{path}.lora_A.weight": path for path in paths if path.rpartition(".")[2] in kept}
        state = {key: torch.empty(1, 1, device="meta") for key in keys}
        read = conversion.convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), state)
    except (AttributeError, TypeError):  # PEFT's functions take other arguments now: what they would do is not known
        return set()
    return paths - {keys[key] for key in keys.keys() & read.keys()}
