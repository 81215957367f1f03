"""A warning after the first training step, for adapters that got no gradient."""

import warnings
import weakref

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .modules import dora_layers, listed


def warn_after_first_step(model: nn.Module) -> None:
    """Looks once, when an optimizer is about to step that has the model's magnitudes, and warns then."""
    reference, looked = weakref.ref(model), False

    def look(optimizer: Optimizer, args, kwargs) -> None:
        nonlocal looked
        model = reference()
        if looked or model is None:
            return
        steps = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        layers = {path: layer for path, layer in dora_layers(model).items() if id(layer.magnitude) in steps}
        if layers:
            # Not removed here: torch is iterating over all such hooks, and raises where another one follows.
            looked = True
            _warn_of_idle(layers)

    handle = register_optimizer_step_pre_hook(look)
    weakref.finalize(model, handle.remove)


def _warn_of_idle(layers: dict[str, nn.Module]) -> None:
    idle = [
        path
        for path, layer in layers.items()
        if all(factor.grad is None for factor in (layer.lora_A, layer.lora_B, layer.magnitude))
    ]
    if idle and len(idle) < len(layers):
        warnings.warn(
            f"{len(idle)} of {len(layers)} DoRA layers got no gradient before the first optimizer step "
            f"({listed(idle)}): this batch did not reach them, or the model reads their weights without calling them, "
            "so that their adapters do nothing; list those in `exclude_modules`",
            stacklevel=4,
        )
