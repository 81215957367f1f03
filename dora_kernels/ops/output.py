"""Whether a model writes in place over a layer's output, from which the magnitude's gradient is read."""

from dataclasses import dataclass

import torch

NOTHING = torch.empty(0)
"""May take the place of any tensor's data. A fresh one would cost each call microseconds."""


@dataclass
class OutputUse:
    """What the calls of one layer share."""

    is_written: bool = False  # by the model, in place: from then on it gets a copy


class WriteCounter:
    """A tensor's in-place writes since now, counted by autograd; its memory is not held."""

    def __init__(self, tensor: torch.Tensor):
        # `detach` shares the tensor's counter, and an alias that is given other data keeps it.
        self._alias = tensor.detach()
        self._alias.data = NOTHING if type(tensor) is torch.Tensor and not tensor.is_meta else tensor.new_empty(0)
        self._start = self._alias._version

    @property
    def has_moved(self) -> bool:
        return self._alias._version != self._start
