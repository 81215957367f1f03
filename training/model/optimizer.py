"""What AdamW gets: magnitudes apart from the rest."""

import torch


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Trained parameters in AdamW's groups: magnitudes apart and without weight decay, which would pull the length of
    each output feature's weight towards zero instead of towards the base's.

    Magnitudes must be fp32: Adam's steps on a bf16 magnitude near 1 round to nothing. Raises ValueError otherwise.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    magnitudes = [(name, parameter) for name, parameter in trained if "magnitude" in name]
    for name, parameter in magnitudes:
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} must be torch.float32, got {parameter.dtype}")
    others = [parameter for name, parameter in trained if "magnitude" not in name]
    groups = [
        {"params": others, "weight_decay": weight_decay},
        {"params": [parameter for _, parameter in magnitudes], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
