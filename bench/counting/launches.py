"""Which kernels the engine launches, with which types, sizes and configurations, found by calling it.

`dora_linear` runs forward and backward on fake CPU tensors, for which nothing is allocated; in place of Triton's
launch stands a recorder that asks Triton itself what it would compile. No list of configurations is kept by hand.
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

from dora_kernels import dora_linear
from dora_kernels.ops import chunked, dispatch
from dora_kernels.ops import gpus as launch_data
from dora_kernels.ops.base_weights import Nf4Weight

from . import accounting

CAPABILITIES = tuple(sorted(launch_data.GPUS))

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64"}
DTYPES = ((BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32), (FP64, FP64))
"""(x and weight, adapter)."""


class Case(NamedTuple):
    """One call of `dora_linear`, and of its backward where `trains`."""

    dtype: torch.dtype
    adapter_dtype: torch.dtype
    space: str
    rank: int
    out_features: int = 4096
    in_features: int = 4096
    tokens: int = 512
    rounding: str = "dithered"
    bias: bool = False
    dropout_mode: str | None = None
    trains: str = (
        "all"  # or "adapter" (no gradient for x), "factors" (nor for the magnitude), "nothing", "frozen scale"
    )
    grad_layout: str = "contiguous"  # or "expanded" (stride 0), "transposed"
    nf4: str | None = None  # "plain" or "nested" statistics, or "parity": nested, rounded first

    @property
    def dtypes(self) -> str:
        return f"{NAMES[self.dtype]}/{NAMES[self.adapter_dtype]}"

    def __str__(self) -> str:
        sizes = f"r={self.rank} {self.out_features}x{self.in_features} M={self.tokens}"
        options = self._asdict().items() - Case(*self[:7])._asdict().items()
        return " ".join([f"{self.dtypes} {self.space} space {sizes}", *sorted(f"{k}={v}" for k, v in options)])


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
        attrs = {path: [["tt.divisibility", 16]] for path in self.divisible}
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        return ASTSource(kernel, dict(self.signature), dict(self.constexprs), attrs)

    def __str__(self) -> str:
        settings = {}
        for name, value in self.constants.items():
            if name.isupper() and len(name) > 1:
                settings |= value._asdict() if hasattr(value, "_asdict") else {name: value}
        settings |= dict(self.options)
        return " ".join([self.name, *(f"{name}={value}" for name, value in settings.items())])


def quick_cases() -> Iterable[Case]:
    """One call per compiled path: every type, both spaces, each class of rank, each class of shape, each option.

    Ranks differ in the blocks they are walked in, in dividing by 16, and in the backward's fused product. Types that
    share their code with others (16-bit adapters, fp64 for gradcheck) get fewer.
    """
    for dtypes in DTYPES:
        for space in _spaces(dtypes[0]):
            for rank in (1, 8, 16, 24, 64) if FP32 in dtypes else (16, 24, 64):
                yield Case(*dtypes, space, rank)
            yield Case(*dtypes, space, 16, 1024, 4096, 1)
            yield Case(*dtypes, space, 100, 1001, 333, 77)
            yield Case(*dtypes, space, 24, 1001, 333, 77)
        # What spilled once: wide values beside masks that no size makes superfluous.
        yield Case(*dtypes, "token", 33)
        yield Case(*dtypes, "token", 1, 1001, 333, 1)
        yield Case(*dtypes, _spaces(dtypes[0])[-1], 16, 1001, 333, 1)
        yield Case(*dtypes, _spaces(dtypes[0])[-1], 24, 1024, 4096, 1)
    yield from _options(DTYPES[:1] + DTYPES[3:5], (16,))
    yield from _nf4(DTYPES[:1], (8, 64), ("nested",))
    yield from _nf4(DTYPES[1:2], (16,), ("plain", "parity"))


def all_cases() -> Iterable[Case]:
    """Every rank from 1 to 1024; Llama-3-8B's shapes and an odd one; one token to 8192; every option."""
    yield from quick_cases()
    for dtypes in DTYPES:
        for space in _spaces(dtypes[0]):
            for rank in range(1, 1025):
                yield Case(*dtypes, space, rank)
            for shape in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (1001, 333)):
                for tokens in (1, 512, 8192):
                    for rank in (1, 16, 24, 384):
                        yield Case(*dtypes, space, rank, *shape, tokens)
    yield from _options(DTYPES, (1, 16, 24, 384))
    yield from _nf4(DTYPES[:5], (1, 8, 16, 17, 24, 32, 33, 64, 384, 1024), ("plain", "nested", "parity"))


def roof_cases() -> Iterable[Case]:
    """What the table of roofs shows: 4096 × 4096 at 8192 tokens, three ranks; 1024 output features, whose
    inputs are split; NF4."""
    for space in ("token", "weight"):
        for rank in (16, 64, 384):
            yield Case(BF16, FP32, space, rank, tokens=8192)
        for rank in (16, 64):
            yield Case(BF16, BF16, space, rank, tokens=8192)
    yield Case(BF16, FP32, "weight", 16, 1024, 4096, 8192)
    yield Case(BF16, FP32, "weight", 16, tokens=8192, nf4="nested")


def _nf4(dtype_pairs, ranks, kinds) -> Iterable[Case]:
    for dtypes in dtype_pairs:
        for rank in ranks:
            for nf4 in kinds:
                case = Case(*dtypes, _spaces(dtypes[0])[-1], rank, nf4=nf4)
                yield case
                yield case._replace(out_features=1024)
                yield case._replace(out_features=1001, in_features=333, tokens=77)
        # Token space, with an odd and an even number of inputs: what dropout needs.
        yield Case(*dtypes, "token", 16, dropout_mode="lora", nf4="nested")
        yield Case(*dtypes, "token", 16, 1001, 333, 77, dropout_mode="lora", nf4="nested")


def _options(dtype_pairs, ranks) -> Iterable[Case]:
    for dtypes in dtype_pairs:
        for rank in ranks:
            for space in _spaces(dtypes[0]):
                plain = Case(*dtypes, space, rank)
                yield plain._replace(bias=True)
                yield plain._replace(rounding="nearest")
                for trains in ("adapter", "factors", "nothing", "frozen scale"):
                    yield plain._replace(trains=trains)
            token = Case(*dtypes, "token", rank)
            for mode in ("lora", "peft"):
                yield token._replace(dropout_mode=mode)
                yield token._replace(dropout_mode=mode, bias=True)
            for layout in ("expanded", "transposed"):
                yield token._replace(grad_layout=layout)


def _spaces(dtype: torch.dtype) -> tuple[str, ...]:
    # Training in fp16 with a trained magnitude runs in token space only, and `dispatch` says so.
    return ("token",) if dtype == FP16 else ("token", "weight")


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
        patches.enter_context(mock.patch.object(JITFunction, "run", recorder.hook()))
        for case in cases:
            call(case)
            for made in recorder.take():
                yield case, made


def call(case: Case) -> None:
    """Runs the call that `case` describes, forward and backward."""
    training = case.trains in ("all", "adapter", "factors")
    trained = {"weight": False, "x": case.trains == "all", "magnitude": case.trains in ("all", "adapter")}
    N, K, R, M = case.out_features, case.in_features, case.rank, case.tokens

    def make(name, *shape, dtype=case.adapter_dtype):
        return torch.empty(shape, dtype=dtype, requires_grad=training and trained.get(name, True))

    frozen_scale = None
    if case.trains == "frozen scale":
        acc = FP64 if case.dtype == FP64 else FP32
        frozen_scale = (torch.empty(N, dtype=acc), torch.empty(N, dtype=acc))
    y = dora_linear(
        make("x", M, K, dtype=case.dtype), _nf4_weight(case) if case.nf4 else make("weight", N, K, dtype=case.dtype),
        make("lora_A", R, K), make("lora_B", N, R), make("magnitude", N),
        bias=make("bias", N, dtype=case.dtype) if case.bias else None,
        scaling=2.0, space=case.space, impl="triton", rounding=case.rounding, frozen_scale=frozen_scale,
        training=case.dropout_mode is not None, dropout_mode=case.dropout_mode or "lora",
        lora_dropout=0.1 if case.dropout_mode else 0.0,
    )  # fmt: skip
    if training:
        grad = {
            "contiguous": lambda: torch.empty_like(y),
            "expanded": lambda: torch.empty((), dtype=y.dtype).expand_as(y),
            "transposed": lambda: torch.empty(N, M, dtype=y.dtype).T,
        }
        y.backward(grad[case.grad_layout]())


def _nf4_weight(case: Case) -> Nf4Weight:
    N, K = case.out_features, case.in_features
    blocks, nested = -(-N * K // 64), case.nf4 != "plain"
    return Nf4Weight(
        torch.empty(-(-N * K // 2), dtype=torch.uint8),
        torch.empty(blocks, dtype=torch.uint8 if nested else FP32),
        torch.empty(16),
        torch.empty(-(-blocks // 256)) if nested else None,
        torch.empty(256) if nested else None,
        torch.empty(()) if nested else None,
        torch.Size((N, K)),
        BF16,
        blocksize=64,
        nested_blocksize=256 if nested else 0,
        parity=case.nf4 == "parity",
    )


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
        )
        return launch, bound


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
