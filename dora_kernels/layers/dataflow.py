"""Which tensors go where inside a module's call: its operations and the calls of its linear layers, in their order.

A tensor is known by a reference to a mark that it carries and that lives as long. Two references to one tensor are one
object. A weak reference to the tensor itself would keep a module from being moved or cast in a forward.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.output import WriteCounter

LONGEST = 40
"""The steps of a call that are kept. A gated MLP has at most seven."""

Reference = weakref.ReferenceType


class Mark:
    """Lives as long as the tensor that carries it."""


class Operation(NamedTuple):
    """One of ATen's, outside the linear layers."""

    function: torch._ops.OpOverload
    inputs: tuple[Reference, ...]  # the tensors among its arguments
    settings: tuple[object, ...]  # its other arguments, those by name as pairs
    outputs: tuple[Reference, ...]
    with_grad: bool

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
    with_grad: bool

    @property
    def inputs(self) -> tuple[Reference, ...]:
        return () if self.x is None else (self.x,)


class ModuleCall:
    """A call of a module with two linear layers or more inside."""

    def __init__(self, path: str, args: tuple, kwargs: dict):
        self.path = path
        self.x = _only_tensor(args, kwargs)  # None where it was called with anything but one tensor
        self.with_grad = torch.is_grad_enabled()
        self.result: Reference | None = None  # None where it returned anything but a tensor
        self.steps: list[Operation | LayerCall] = []
        self.children: list[LayerCall] = []  # of the module's own children, without a limit
        self._counters: dict[Reference, tuple[int, WriteCounter]] = {}

    @property
    def is_whole(self) -> bool:
        """Whether all its steps were kept."""
        return len(self.steps) < LONGEST

    def writes_to(self, x: torch.Tensor) -> int:
        """How often x was found written over, when a child got it."""
        known = _reference(x)
        writes, counter = self._counters.get(known) or (0, WriteCounter(x))
        if counter.has_moved:
            writes, counter = writes + 1, WriteCounter(x)
        self._counters[known] = writes, counter
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
            around = next((call for call in reversed(self._open) if call.path == parent), None)
            was_in_layer, self._in_layer, with_grad = self._in_layer, True, torch.is_grad_enabled()
            try:
                x = _only_tensor(args, kwargs)
                writes = around.writes_to(args[0]) if around and x else 0
                y = forward(*args, **kwargs)
            finally:
                self._in_layer = was_in_layer
            call = LayerCall(path, x, writes, _references((y,)), getattr(y, "shape", torch.Size()), with_grad)
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
            named = [(name, value) for name, value in kwargs.items() if not _references((value,))]
            settings = (*(value for value in args if not _references((value,))), *named)
            inputs, outputs = _references((*args, *kwargs.values())), _references((result,))
            self._add(Operation(function, inputs, settings, outputs, torch.is_grad_enabled()))
        return result

    def _add(self, step: Operation | LayerCall) -> None:
        for call in self._open:
            if call.is_whole:
                call.steps.append(step)


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _only_tensor(args: tuple, kwargs: dict) -> Reference | None:
    return _reference(args[0]) if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) else None


def _reference(tensor: torch.Tensor) -> Reference:
    if not isinstance(tensor, FakeTensor):  # a constant of the model's own, which stays as it is
        return weakref.ref(tensor)
    if not hasattr(tensor, "_mark"):
        tensor._mark = Mark()
    return weakref.ref(tensor._mark)


def _references(values) -> tuple[Reference, ...]:
    """Of the tensors among the values, and in the lists among them."""
    lists = (value if isinstance(value, (list, tuple)) else (value,) for value in values)
    return tuple(_reference(value) for listed in lists for value in listed if isinstance(value, torch.Tensor))
