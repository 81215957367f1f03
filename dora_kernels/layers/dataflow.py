"""Which tensors go where inside a module's call: its operations and the calls of its linear layers, in their order.

A tensor is known by a weak reference. Two references to one tensor are one object.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.output import WriteCounter

LONGEST = 40
"""The steps of a call that are kept. A gated MLP has at most seven, of which one more holds a mask of dropout."""

Reference = weakref.ReferenceType


class Operation(NamedTuple):
    """One of ATen's, outside the linear layers."""

    function: torch._ops.OpOverload
    inputs: tuple[Reference, ...]  # the tensors among its arguments
    settings: tuple[object, ...]  # its other arguments, those by name as pairs
    outputs: tuple[Reference, ...]

    @property
    def name(self) -> str:
        return self.function.overloadpacket.__name__

    @property
    def is_write(self) -> bool:
        return self.function._schema.is_mutable


class LayerCall(NamedTuple):
    """A linear layer's."""

    path: str
    x: Reference | None  # None where it was called with anything but one tensor
    writes: int  # to x, seen since a layer of the same module first got it
    outputs: tuple[Reference, ...]
    shape: torch.Size  # of the output

    @property
    def inputs(self) -> tuple[Reference, ...]:
        return () if self.x is None else (self.x,)


class ModuleCall:
    """A call of a module with two linear layers or more inside."""

    def __init__(self, path: str, args: tuple, kwargs: dict):
        self.path = path
        self.x = _only_tensor(args, kwargs)  # None where it was called with anything but one tensor
        self.result: Reference | None = None  # None where it returned anything but a tensor
        self.steps: list[Operation | LayerCall] = []
        self.children: list[LayerCall] = []  # of the module's own children, without a limit
        self._counters: dict[int, tuple[int, WriteCounter]] = {}

    @property
    def is_whole(self) -> bool:
        """Whether all its steps were kept."""
        return len(self.steps) < LONGEST

    def writes_to(self, x: torch.Tensor) -> int:
        """How often x was found written over, when a child got it."""
        key = id(weakref.ref(x))
        writes, counter = self._counters.get(key) or (0, WriteCounter(x))
        if counter.has_moved:
            writes, counter = writes + 1, WriteCounter(x)
        self._counters[key] = writes, counter
        return writes

    def name_of(self, path: str) -> str | None:
        """The path as the module sees it, None where it lies outside."""
        if not self.path:
            return path
        return path.removeprefix(f"{self.path}.") if path.startswith(f"{self.path}.") else None


class Dataflow(TorchDispatchMode):
    """Follows the calls of a model's modules, and hands over each that returned."""

    def __init__(self, returned: Callable[[ModuleCall], None]):
        super().__init__()
        self._returned = returned
        self._open: list[ModuleCall] = []
        self._in_layer = False

    def start(self, model: nn.Module, paths: list[str]) -> None:
        """Puts a forward on the linear layers at `paths`, and on the modules around two of them or more."""
        around = Counter(parent for path in paths for parent in _parents(path))
        for path in paths:
            layer = model.get_submodule(path)
            layer.forward = self._followed_layer(path, layer.forward)
        for path, count in around.items():
            if count > 1:
                module = model.get_submodule(path)
                module.forward = self._followed_module(path, module.forward)

    def _followed_layer(self, path, forward):
        parent = path.rpartition(".")[0]

        @functools.wraps(forward)
        def followed(*args, **kwargs):
            around = self._open[-1] if self._open and self._open[-1].path == parent else None
            was_in_layer, self._in_layer = self._in_layer, True
            try:
                x = _only_tensor(args, kwargs)
                writes = around.writes_to(args[0]) if around and x else 0
                y = forward(*args, **kwargs)
            finally:
                self._in_layer = was_in_layer
            call = LayerCall(path, x, writes, _references((y,)), getattr(y, "shape", torch.Size()))
            self._add(call)
            if around:
                around.children.append(call)
            return y

        return followed

    def _followed_module(self, path, forward):
        @functools.wraps(forward)
        def followed(*args, **kwargs):
            call = ModuleCall(path, args, kwargs)
            self._open.append(call)
            try:
                result = forward(*args, **kwargs)
            finally:
                self._open.pop()
            call.result = _only_tensor((result,), {})
            self._returned(call)
            return result

        return followed

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        # prim's ask for a tensor's device: that is no use of its values.
        if self._open and not self._in_layer and function.namespace != "prim":
            settings = (
                *(a for a in args if not _has_tensor(a)),
                *((k, v) for k, v in kwargs.items() if not _has_tensor(v)),
            )
            outputs = _references(result if isinstance(result, (list, tuple)) else (result,))
            self._add(Operation(function, _references((*args, *kwargs.values())), settings, outputs))
        return result

    def _add(self, step: Operation | LayerCall) -> None:
        for call in self._open:
            if call.is_whole:
                call.steps.append(step)


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _only_tensor(args: tuple, kwargs: dict) -> Reference | None:
    return weakref.ref(args[0]) if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) else None


def _has_tensor(value) -> bool:
    return bool(_references((value,)))


def _references(values) -> tuple[Reference, ...]:
    """Of the tensors among the values, and in the lists among them."""
    found = []
    for value in values:
        found += [
            weakref.ref(v)
            for v in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(v, torch.Tensor)
        ]
    return tuple(found)
