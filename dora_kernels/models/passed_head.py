"""A head whose weight a fused loss multiplies by itself: it reads W', through which the adapter trains."""

import torch
from torch import is_grad_enabled, nn

from ..layers.linear import DoraLinear
from ..ops.base_weights import Weight
from ..ops.dora_weight import dora_weight
from ..ops.types import Rounding
from .targets import output_embeddings


class ReadHead(DoraLinear):
    """A model's head. While the model's forward runs, its `weight` is W', computed once; else it is the base layer's.

    W' [vocabulary, hidden] is held from the first reading to the end of the backward pass, where the loss adds its
    gradient of the same size.
    """

    is_open = False
    was_used = False
    merged: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        if not self.is_open:
            return self._parameters["weight"]
        self.was_used = True
        if self.merged is None:
            if self.training and self.lora_dropout > 0:
                raise ValueError(
                    "the loss multiplies by the head's weight without calling it, and the head has lora_dropout > 0, "
                    "for which there is no such weight: set lora_dropout=0, or compute the loss from the logits"
                )
            self.merged = dora_weight(
                self.base_weight, *self.factors, scaling=self.scaling, dtype=self.base_dtype,
                rounding=Rounding(self.rounding, self.salt), impl=self.impl, merge_aware=self.merge_aware,
            )  # fmt: skip
        return self.merged

    @property
    def base_weight(self) -> Weight:
        """The frozen weight, open or not."""
        was_open, self.is_open = self.is_open, False
        try:
            return super().base_weight
        finally:
            self.is_open = was_open


def watch_head(model: nn.Module) -> None:
    """Opens the model's head, if it has an adapter, while the model's forward runs. A forward in training raises
    ValueError where it neither called the head nor read its weight."""
    head = output_embeddings(model)
    if isinstance(head, DoraLinear):
        head.__class__ = ReadHead
        head.register_forward_pre_hook(note_call)
        model.register_forward_pre_hook(open_head)
        model.register_forward_hook(close_head, always_call=True)


def note_call(head: nn.Module, args: tuple) -> None:
    head.was_used = True


def open_head(model: nn.Module, args: tuple) -> None:
    head = output_embeddings(model)
    head.is_open, head.was_used, head.merged = True, False, None


def close_head(model: nn.Module, args: tuple, output) -> None:
    head = output_embeddings(model)
    head.is_open, head.merged = False, None
    # An error of forward comes without an output.
    if output is not None and model.training and is_grad_enabled() and not head.was_used:
        raise ValueError(
            "the model's head has an adapter, but this forward neither called it nor read its weight, so that the "
            "adapter would not train: leave the head out of `target_modules`, or compute the loss from the logits"
        )


HOOKS = (note_call, open_head, close_head)
