"""Parameter groups of AdamW."""

import torch


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """The trained parameters in two groups: magnitudes, without weight decay, and the rest.

    Weight decay would pull a magnitude to zero, not to the norm of the base weight.

    Raises:
        ValueError: a magnitude is not fp32. Adam's steps on a bf16 magnitude near 1 round to nothing.
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
