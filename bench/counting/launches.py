"""Which kernels the engine launches, with which types, sizes and configurations, found by calling it.

`dora_linear`, `dora_mlp` and `dora_experts` run forward and backward on fake CPU tensors, for which nothing is
allocated; in place of Triton's launch stands a recorder that asks Triton itself what it would compile. No list of
configurations is kept by hand.
"""

import importlib
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from dora_kernels.ops import chunked, dispatch, dora_experts, stacks
from dora_kernels.ops import gpus as launch_data

from . import accounting
from .cases import Case, call

CAPABILITIES = tuple(sorted(launch_data.GPUS))


class SizedLaunch(NamedTuple):
    """A launch with what the compiled kernel does not depend on. `arguments` are the compiled function's parameters by
    name: a scalar's value, a tensor's bytes."""

    launch: "Launch"
    grid: tuple[int, ...]
    arguments: tuple[tuple[str, float], ...]
    traffic: accounting.Traffic

    @property
    def elements(self) -> int:
        """Of the matrix that the kernel walks: [N, K] where it knows K, else [M, N], or a factor."""
        sizes = dict(self.arguments)
        if stack := self.launch.constants.get("STACK"):
            sizes["N"] = sum(stack.features)
        walked = next((axes for axes in ("NK", "MN", ("rows", "columns")) if all(a in sizes for a in axes)), "N")
        return math.prod(int(sizes[axis]) for axis in walked)

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


class Launch(NamedTuple):
    """What identifies one compiled kernel: hashable, and picklable for the processes that compile."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[tuple[int, ...], object], ...]
    divisible: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, object], ...]
    contiguous: bool  # every matrix argument, along one of its dimensions
    specialized: tuple[tuple[int, ...], ...] = ()  # the arguments whose divisibility Triton looked at

    @property
    def name(self) -> str:
        return self.kernel.strip("_").removesuffix("_kernel")

    @property
    def num_warps(self) -> int:
        return dict(self.options).get("num_warps", 4)

    @property
    def constants(self) -> dict[str, object]:
        """The constexpr arguments by name, those that Triton made constant because they are 1 included."""
        return {self.signature[path[0]][0]: value for path, value in self.constexprs}

    def source(self) -> ASTSource:
        # Also those that are not divisible: Triton finds a compiled kernel by all of them.
        attrs = {path: [["tt.divisibility", 16]] if path in self.divisible else [] for path in self.specialized}
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        return ASTSource(kernel, dict(self.signature), dict(self.constexprs), attrs)

    def __str__(self) -> str:
        settings = {}
        for name, value in self.constants.items():
            if name.isupper() and len(name) > 1:
                settings |= value._asdict() if hasattr(value, "_asdict") else {name: value}
        settings |= dict(self.options)
        return " ".join([self.name, *(f"{name}={value}" for name, value in settings.items())])


def launches(cases: Iterable[Case], capability: tuple[int, int]) -> dict[Launch, Case]:
    """Each distinct launch of these calls on a GPU of `capability`, with the first call that makes it."""
    found: dict[Launch, Case] = {}
    for case, made in sized_launches(cases, capability):
        found.setdefault(made.launch, case)
    return found


def sized_launches(cases: Iterable[Case], capability: tuple[int, int]) -> Iterator[tuple[Case, SizedLaunch]]:
    """Every launch of these calls on a GPU of `capability`, in order."""
    recorder = Recorder(capability)
    with ExitStack() as patches:
        patches.enter_context(FakeTensorMode())
        # Fake CPU tensors, for torch without CUDA differentiates no others; dispatch and launchers see this GPU.
        patches.enter_context(mock.patch.object(dispatch, "_why_no_triton", lambda device: None))
        patches.enter_context(mock.patch.object(launch_data, "DEFAULT_GPU", launch_data.GPUS[capability]))
        # The CPU's product of long factors in one piece: here it only costs time.
        patches.enter_context(mock.patch.object(chunked, "CHUNK_ELEMENTS", 1 << 62))
        # PyTorch's own launches; where a loop takes their place, it would ask how many tokens each expert has.
        for module in (dora_experts, stacks):
            patches.enter_context(mock.patch.object(module, "grouped_mm", _shaped_product))
        patches.enter_context(mock.patch.object(JITFunction, "run", recorder.hook()))
        for case in cases:
            call(case)
            for made in recorder.take():
                yield case, made


class Recorder:
    """Takes the place of Triton's launch; `take` returns what was launched since it was last asked."""

    def __init__(self, capability: tuple[int, int]):
        self._backend = make_backend(target_of(capability))
        self._binders: dict[JITFunction, object] = {}
        self._seen: list[SizedLaunch] = []

    def hook(self):
        def run(kernel, *args, grid, warmup, **kwargs):
            self._seen.append(self.sized(kernel, *args, grid=grid, **kwargs))

        return run

    def take(self) -> list[SizedLaunch]:
        seen, self._seen = self._seen, []
        return seen

    def bind(self, kernel: JITFunction, *args, **kwargs) -> Launch:
        """The launch `kernel[grid](*args, **kwargs)`, specialised as Triton specialises it."""
        return self._bound(kernel, args, kwargs)[0]

    def sized(self, kernel: JITFunction, *args, grid: tuple[int, ...], **kwargs) -> SizedLaunch:
        """The launch with its grid, arguments and traffic."""
        launch, bound = self._bound(kernel, args, kwargs)
        arguments = [(name, float(value)) for name, kind in launch.signature for value in _compiled(kind, bound[name])]
        return SizedLaunch(launch, tuple(grid), tuple(arguments), accounting.of_launch(kernel, grid, args))

    def _bound(self, kernel: JITFunction, args, kwargs) -> tuple[Launch, dict]:
        if kernel not in self._binders:
            self._binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, self._backend)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        # Fake tensors have no address; a real one's start is aligned.
        args = [_stand_in(a) if isinstance(a, torch.Tensor) else a for a in args]
        bound, specialization, options = self._binders[kernel](*args, **kwargs)
        _, signature, constexprs, attrs = kernel._pack_args(self._backend, kwargs, bound, specialization, options)
        launch = Launch(
            kernel.fn.__module__,
            kernel.fn.__name__,
            tuple(signature.items()),
            tuple(constexprs.items()),
            tuple(path for path, hints in attrs.items() if hints),
            tuple((name, value) for name, value in kwargs.items() if name not in signature),
            all(1 in tensor.stride() for tensor in tensors if tensor.ndim == 2),
            tuple(attrs),
        )
        return launch, bound


def _shaped_product(x: torch.Tensor, stack: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], stack.shape[2])


def _stand_in(tensor: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(dtype=tensor.dtype, data_ptr=lambda: 0, nbytes=tensor.nbytes)


def _compiled(kind, value) -> Iterator[float]:
    """The values of an argument that are parameters of the compiled function."""
    if isinstance(kind, tuple):
        for part in zip(kind, value):
            yield from _compiled(*part)
    elif kind != "constexpr":
        yield getattr(value, "nbytes", value)


def target_of(capability: tuple[int, int]) -> GPUTarget:
    return GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
