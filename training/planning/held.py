"""Bytes that are alive, counted from what operations return: a storage is held until Python and autograd let it go."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldBytes(TorchDispatchMode):
    """Inside, `held` are the bytes alive of those allocated inside, and `peak` the most since `restart`."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._known = weakref.WeakSet()

    def restart(self) -> int:
        """Begins a new peak at what is held now, which it returns."""
        self.peak = self.held
        return self.held

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.hold(tensors((args, kwargs)), tensors(out))
        return out

    def hold(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Counts the storages of `outputs` that none of `inputs` has."""
        before = {id(tensor.untyped_storage()) for tensor in inputs}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if id(storage) in before or storage in self._known:
                continue
            self._known.add(storage)
            size = storage.nbytes()
            self.held += size
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.held -= size


def tensors(tree) -> list[torch.Tensor]:
    """All tensors in it."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
