"""A GPU that is not there: tensors are fake, nothing is computed or allocated, and the engine takes its ways on a GPU.

The fake tensors are the CPU's, which torch without CUDA can differentiate.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils

from dora_kernels.ops import chunked, dispatch
from dora_kernels.ops import gpus as launch_data

from . import without_triton


@contextmanager
def fake_gpu(
    launched: Callable | None = None,
    capability: tuple[int, int] | None = None,
    mode: FakeTensorMode | None = None,
) -> Iterator[None]:
    """Inside, `launched` stands where Triton launches, on a GPU of `capability`; None is one that nothing is known of.
    Where nobody asks what is launched, it needs no Triton.

    Fake tensors belong to a mode: whoever comes back to some gives theirs.

    Raises:
        ValueError: the kernels whose launches are asked for cannot be imported here.
    """
    if dispatch.kernels is None and launched is not None:
        raise ValueError(
            f"what a GPU would run is counted from its kernels, which are missing: {dispatch._IMPORT_ERROR}"
        )
    choose_impl = dispatch.choose_impl

    def as_on_a_gpu(device, impl="auto"):
        return choose_impl(device, "triton" if impl == "auto" else impl)

    def mm_fp32(a, b):
        # As on a GPU. On CPU tensors the engine's own is a loop.
        return torch.mm(a, b, out_dtype=torch.float32)

    def run(kernel, *args, **options):
        if launched is not None:
            launched(kernel, *args, **options)

    if dispatch.kernels is None:
        kernels, launching = without_triton.kernels(), ()
    else:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        kernels, launching = dispatch.kernels, (InterpretedFunction, JITFunction)
    known = launch_data.GPUS.get(capability, launch_data.DEFAULT_GPU)
    with ExitStack() as stack:
        for holder, name, stand_in in (
            (dispatch, "choose_impl", as_on_a_gpu),
            (dispatch, "_why_no_triton", lambda device: None),
            (dispatch, "_capability", lambda device: capability),
            (launch_data, "DEFAULT_GPU", known),
            *((kind, "run", run) for kind in launching),
            (dispatch, "kernels", kernels),
            # Whether a batch is packed is read from its positions, which have no values; here none is.
            (masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
            *((module, "mm_fp32", mm_fp32) for module in _users_of(chunked.mm_fp32)),
        ):
            stack.enter_context(mock.patch.object(holder, name, stand_in))
        # A counter that is entered later sees what is issued, and not what a fake tensor does inside.
        stack.enter_context(mode or FakeTensorMode())
        yield


def _users_of(function: Callable) -> list[ModuleType]:
    """The engine's modules that have it by its name."""
    engine = [module for name, module in sys.modules.items() if name.startswith("dora_kernels.")]
    return [module for module in engine if getattr(module, function.__name__, None) is function]


def fake_module(module: nn.Module, fake: Callable[[torch.Tensor], torch.Tensor]) -> dict[int, torch.Tensor]:
    """Inside `fake_gpu`: gives the module parameters and buffers made by `fake`; what each became, by the id of what it
    was."""
    fakes: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in fakes:
                        fakes[id(tensor)] = fake(tensor)
                    tensors[name] = fakes[id(tensor)]
    return fakes


def fake_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Of its shape and dtype, a parameter for a parameter."""
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
