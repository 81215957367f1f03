"""CPU or fake tensors that the engine takes for a GPU's, for tests that trace or count and compute nothing."""

import sys
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from dora_kernels.ops import dispatch


def _mm_fp32(a, b):
    """As on a GPU. On CPU tensors `gemm.mm_fp32` is a loop."""
    return torch.mm(a, b, out_dtype=torch.float32)


def users_of_mm_fp32():
    """The engine's modules that import it by name."""
    users = [
        module
        for name, module in sys.modules.items()
        if name.startswith("dora_kernels.") and name != "dora_kernels.ops.chunked" and hasattr(module, "mm_fp32")
    ]
    assert users, "no module imports mm_fp32: has it another name now?"
    return users


@contextmanager
def taken_for_gpu():
    """Inside, `impl="triton"` is available on any device, and products take the path they take on a GPU."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(dispatch, "_why_no_triton", lambda device: None))
        for module in users_of_mm_fp32():
            stack.enter_context(patch.object(module, "mm_fp32", _mm_fp32))
        yield
