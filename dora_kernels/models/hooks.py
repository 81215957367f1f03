"""The hooks and the methods of its own that an adapted model carries."""

from torch import nn

from .checkpointing import give_gradient, pass_gradients
from .passed_head import HOOKS, watch_head
from .resizing import allow_resizing, refuse_resizing

OURS = {give_gradient, *HOOKS}


def add_hooks(model: nn.Module) -> None:
    remove_hooks(model)
    pass_gradients(model)
    watch_head(model)
    refuse_resizing(model)


def remove_hooks(model: nn.Module) -> None:
    allow_resizing(model)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in OURS]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
