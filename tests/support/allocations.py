"""Fresh memory, counted by torch's dispatcher."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction


class Allocations(TorchDispatchMode):
    """Counts fresh storages by the shape and dtype of the tensor that came with them."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.made[tuple(tensor.shape), tensor.dtype] += 1
        return result


def without_the_interpreters(monkeypatch):
    """Leaves out what the interpreter allocates to run a kernel: it has no counterpart on a GPU."""
    run = InterpretedFunction.run

    def uncounted(*args, **kwargs):
        with _disable_current_modes():
            return run(*args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", uncounted)
