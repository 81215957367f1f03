"""Whether a model writes in place over a layer's output, from which the magnitude's gradient is read."""

from dataclasses import dataclass

import torch

NOTHING = torch.empty(0)
"""May take the place of any tensor's data. A fresh one would cost each call microseconds."""


@dataclass
class OutputUse:
    """What the calls of one layer share."""

    is_written: bool = False  # by the model, in place: from then on it gets a copy
    last_norm: object = None  # of the last checkpointed forward, see `recomputation`
    keeps_norm: bool = False  # inside `accumulating`
    kept_norm: object = None  # there, see `accumulation`
    keeps_weight: bool = False  # there too, where W' is kept as well
    kept_weight: object = None  # see `kept_weight`

    def __getstate__(self) -> dict:
        # A copy or a pickle is in no scope, and in no checkpointed region.
        return vars(OutputUse(self.is_written))

    def forget(self) -> None:
        """What was kept of weights that are others by now."""
        self.kept_norm = self.kept_weight = None


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


def shared_with_the_model(
    y: torch.Tensor, use: OutputUse | None
) -> tuple[torch.Tensor, torch.Tensor, WriteCounter | None]:
    """y as the model gets it, what is kept of it, and the counter of the writes to it that the backward must ask."""
    # Compiled code counts no writes. It leaves out a copy that neither is written nor leaves the graph.
    if torch.compiler.is_compiling() or (use is not None and use.is_written):
        return y.clone(), y, None
    if y.is_inference():
        return y, y, None
    # `data` has a counter of its own: saved tensors are read only all together, and a write to one would refuse all.
    return y, y.data, WriteCounter(y)


def columns_shared_with_the_model(y: torch.Tensor, columns: slice) -> tuple[torch.Tensor, WriteCounter | None]:
    """Some columns of y as the model gets them, and the counter of the writes to them; y itself is kept."""
    part = y[:, columns]
    if torch.compiler.is_compiling():
        return part.clone(), None
    if part.is_inference():
        return part, None
    # `data` is no view: autograd refuses to write in place over one of several views that a function returns.
    part = part.data
    return part, WriteCounter(part)


def note_written(use: OutputUse | None, *, can_repeat: bool) -> None:
    """Lets the layer's later calls give away a copy. Raises where y cannot be computed again."""
    if use is not None:
        use.is_written = True
    if not can_repeat:
        remedy = "write over a copy of it" if use is None else "run the step again: the layer now gives away a copy"
        raise RuntimeError(
            "the model wrote in place over a DoRA layer's output, from which the magnitude's gradient is read, and the "
            f"layer's input was not kept, as it has lora_dropout > 0 or a frozen lora_A; {remedy}"
        )
