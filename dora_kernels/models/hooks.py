"""The hooks and the methods of its own that an adapted model carries."""

from types import MethodType

from torch import nn

from .checkpointing import give_gradient, pass_gradients
from .lost_state import save_pretrained
from .passed_head import HOOKS, watch_head
from .resizing import resize_token_embeddings

OURS = {give_gradient, *HOOKS}
METHODS = (save_pretrained, resize_token_embeddings)
"""They stand before those of the same name of the model's class, which they call."""


def add_hooks(model: nn.Module) -> None:
    remove_hooks(model)
    pass_gradients(model)
    watch_head(model)
    for method in METHODS:
        if hasattr(type(model), method.__name__):
            setattr(model, method.__name__, MethodType(method, model))


def remove_hooks(model: nn.Module) -> None:
    for method in METHODS:
        model.__dict__.pop(method.__name__, None)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in OURS]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
