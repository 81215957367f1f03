"""Bytes, FLOPs and memory of a call, counted launch by launch without running it.

Inside `counting(...)` tensors are fake: nothing is computed or allocated. PyTorch's operations are counted by a
dispatch mode, Triton's launches by `accounting`. The fake tensors are the CPU's, which torch without CUDA can
differentiate; `dispatch` and the launchers see the GPU that is asked for.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from ..installation import training
from . import accounting
from .launches import Recorder, SizedLaunch

fake_gpu, held = training("planning.fake_gpu"), training("planning.held")

# Allocations and questions; views are recognised by their schema.
NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "device",
    "detach",
    "_unsafe_view",
}
NO_LAUNCH |= {"set_", "is_same_size", "lift_fresh", "resize_", "_record_function_enter_new", "_record_function_exit"}
RATES = {torch.float32: "fp32", torch.float64: "fp64"}


class Operation(NamedTuple):
    """One launch: bytes that must cross the memory bus, bytes its programs load, FLOPs and their rate."""

    name: str
    memory: int
    loaded: int
    flops: int
    rate: str
    held: int = 0  # bytes alive at its end, of those allocated while counting
    launch: SizedLaunch | None = None  # of a kernel of ours, where kernels can be compiled


class Counter(held.HeldBytes):
    """Notes each operation, and the most bytes that were alive at once of those allocated inside."""

    def __init__(self, capability: tuple[int, int]):
        super().__init__()
        self._recorder = Recorder(capability)
        self.operations: list[Operation] = []

    def take(self) -> list[Operation]:
        """What was launched since it was last asked."""
        taken, self.operations = self.operations, []
        return taken

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "bitsandbytes::gemm_4bit":
            with self:
                return _gemm_4bit(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        inputs, outputs = held.tensors((args, kwargs)), held.tensors(out)
        self.hold(inputs, outputs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_LAUNCH:
            read, written = sum(map(_bytes, _read(args, kwargs))), sum(map(_bytes, _written(func, args, outputs)))
            work = _flops(func, args, kwargs, out, inputs)
            self.operations.append(Operation(name, read + written, read, *work, self.held))
        return out

    def launched(self, kernel, *args, grid, warmup=False, **options) -> None:
        """Stands where Triton launches."""
        traffic = accounting.of_launch(kernel, grid, args)
        name = kernel.fn.__name__.strip("_")
        compiles = isinstance(kernel, JITFunction)
        launch = self._recorder.sized(kernel, *args, grid=grid, **options) if compiles else None
        counted = (traffic.memory, traffic.loaded, traffic.flops, traffic.rate)
        self.operations.append(Operation(name, *counted, self.held, launch))


@contextmanager
def counting(capability: tuple[int, int] = (9, 0)) -> Iterator[Counter]:
    """Yields the counter of everything that runs inside, as it would run on a GPU of `capability`."""
    counter = Counter(capability)

    with fake_gpu.fake_gpu(counter.launched, capability), counter:
        yield counter


def fake_module(module: nn.Module) -> dict[int, torch.Tensor]:
    """Inside `counting`: gives the module fake parameters and buffers; what each became, by the id of what it was."""
    return fake_gpu.fake_module(module, _fake)


class Params4bit(FakeTensor):
    """By this name libraries know bitsandbytes' packed weights."""


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return fake_gpu.fake_tensor(tensor)
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    fake.__class__, fake._is_param, fake.quant_state = Params4bit, True, copy.copy(state)
    for part in (fake.quant_state, fake.quant_state.state2):
        for name in ("absmax", "code", "offset"):
            value = getattr(part, name)
            setattr(part, name, None if value is None else torch.empty(value.shape, dtype=value.dtype))
    return fake


def _gemm_4bit(
    x, packed, shape, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None
):
    """bitsandbytes' product as it runs on a GPU for more than some tokens: the weight written out, then a GEMM."""
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = ops.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    weight = ops.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, x.dtype)
    # Not `@`: here nothing takes it apart into what is counted.
    y = torch.mm(x.flatten(0, -2), weight.T).view(*x.shape[:-1], shape[0])
    return y if bias is None else y.add_(bias)


def _read(args, kwargs) -> list[torch.Tensor]:
    """What an operation reads: all but the tensor that is given for the result."""
    return held.tensors((args, {name: value for name, value in (kwargs or {}).items() if name != "out"}))


def _written(func, args, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What an operation writes: its outputs, and arguments that it changes without returning them."""
    written = {id(tensor): tensor for tensor in outputs}
    for argument, value in zip(func._schema.arguments, args):
        # Fused optimizers write gradients only to unscale them, which nobody here asks for.
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads":
            written |= {id(tensor): tensor for tensor in held.tensors(value)}
    return list(written.values())


def _bytes(tensor: torch.Tensor) -> int:
    """A dimension of stride 0 repeats one element."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride or size == 0 else 1
    return elements * tensor.element_size()


def _flops(func, args, kwargs, out, inputs) -> tuple[int, str]:
    """FLOPs of a matrix product as PyTorch counts them, and the rate of the format it multiplies in."""
    # PyTorch's registry knows addmm and not addmm_, and a GPU's attention, not a CPU's.
    name = func.overloadpacket.__name__.rstrip("_").replace("_for_cpu", "")
    if name == "_grouped_mm":  # tokens with their experts' matrices, or their sums over tokens
        return 2 * inputs[0].numel() * inputs[1].shape[-1], RATES.get(inputs[0].dtype, "bf16")
    count = flop_registry.get(getattr(torch.ops.aten, name, None))
    if count is None:
        return 0, "bf16"
    kwargs = kwargs or {}
    rate = RATES.get(inputs[0].dtype, "bf16")
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args)) | kwargs
    if {"query", "key", "value"} <= given.keys():
        # As if no heads were shared, which costs the same products: PyTorch 2.11 refuses to count shared ones.
        heads = given["query"].shape[1]
        args = [
            torch.Size([argument.shape[0], heads, *argument.shape[2:]]) if name in ("key", "value") else argument
            for name, argument in zip(names, args)
        ]
    total = count(
        *args, **{k: v for k, v in kwargs.items() if k not in ("out_dtype", "attn_mask", "scale")}, out_val=out
    )
    # Under a causal mask half of attention's scores are skipped.
    return total // 2 if given.get("is_causal") else total, rate
