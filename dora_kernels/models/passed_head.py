"""A head that a fused loss passes by: the loss multiplies by its weight, and an adapter there would not train."""

from torch import is_grad_enabled, nn

from ..layers.linear import DoraLinear
from .targets import output_embeddings


def refuse_passed_head(model: nn.Module) -> None:
    """Lets a forward in training raise ValueError where it did not call the head, if that has an adapter."""
    head = output_embeddings(model)
    if isinstance(head, DoraLinear):
        head.register_forward_pre_hook(note_call)
        model.register_forward_pre_hook(forget_call)
        model.register_forward_hook(check_call)


def note_call(head: nn.Module, args: tuple) -> None:
    head.was_called = True


def forget_call(model: nn.Module, args: tuple) -> None:
    output_embeddings(model).was_called = False


def check_call(model: nn.Module, args: tuple, output) -> None:
    head = output_embeddings(model)
    if model.training and is_grad_enabled() and not head.was_called:
        raise ValueError(
            "the model's head has an adapter, but this loss multiplies by its weight without calling it, so that the "
            "adapter would not train: leave the head out of `target_modules`, or compute the loss from the logits"
        )


HOOKS = (note_call, forget_call, check_call)
