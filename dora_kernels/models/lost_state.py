"""Trained state that a save would lose, and the warnings about it."""

import warnings

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def save_pretrained(model: nn.Module, *args, **kwargs):
    """`type(model).save_pretrained`, after a warning. A method of adapted models; a copy of the model has its own."""
    warnings.warn(
        "save_pretrained writes the base model's weights and the DoRA adapter's side by side, of which from_pretrained "
        "reads the base alone: save the adapter with dora_kernels.save_adapter(model, folder), or merge it first with "
        "dora_kernels.merge_dora(model)",
        stacklevel=2,
    )
    return type(model).save_pretrained(model, *args, **kwargs)


def batches_seen(model: nn.Module) -> dict[str, int]:
    """How many batches each BatchNorm layer has counted into its running statistics, by path."""
    return {
        path: int(module.num_batches_tracked)
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.num_batches_tracked is not None
    }


def warn_of_statistics(model: nn.Module, saved: dict[str, nn.Module]) -> None:
    """Warns of running statistics that moved since the model was adapted, outside the `saved` modules."""
    before = getattr(model, "dora_batches", {})
    moved = [
        path
        for path, count in batches_seen(model).items()
        if count != before.get(path, count) and not any(path == s or path.startswith(f"{s}.") for s in saved)
    ]
    if moved:
        warnings.warn(
            f"{len(moved)} BatchNorm layers moved their running statistics in training ({moved[0]} for one), and an "
            "adapter's file does not hold them: keep them in eval mode while training, or name them in "
            "`modules_to_save`",
            stacklevel=3,
        )
