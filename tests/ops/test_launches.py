"""The launch budget: at small sizes a layer is bound by the host, so every call that becomes a GPU launch is counted.

Nothing is computed. Fake tensors have the real sizes of Llama-3-8B, on which launch configurations depend; Triton
launches are noted instead of run, and PyTorch's own operations are counted by a dispatch mode.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import dora_kernels as dk
from dora_kernels.ops.chunked import mm_fp32
from tests.support.stand_in_gpu import taken_for_gpu

SHAPES = {"qo_proj": (4096, 4096), "kv_proj": (1024, 4096), "gate_up_proj": (14336, 4096), "down_proj": (4096, 14336)}
TOKENS = 512
# Allocations and questions; views are recognised by their schema.
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "device", "detach", "_unsafe_view", "set_"}


class _CountOps(TorchDispatchMode):
    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket.__name__ not in NO_LAUNCH:
            self.launches.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _dropout_as_on_a_gpu(x, p):
    """One fused kernel; on CPU tensors PyTorch would draw, divide and multiply."""
    return torch.native_dropout(x, p, True)[0]


@contextmanager
def gpu_stand_in():
    """Yields the list of launches that the calls inside would make on a GPU, by kernel or operator name."""
    launches = []

    def note(self, *args, warmup, **kwargs):
        launches.append(self.fn.__name__)

    replacements = [
        patch.object(InterpretedFunction, "run", note),
        patch.object(JITFunction, "run", note),
        taken_for_gpu(),
        patch("dora_kernels.ops.dora_linear.F.dropout", _dropout_as_on_a_gpu),
    ]
    with ExitStack() as stack:
        for replacement in replacements:
            stack.enter_context(replacement)
        # Fake tensors go below, so that the counter sees what we issue and not what a fake tensor does inside.
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_CountOps(launches))
        yield launches


def layer_launches(shape, R, *, space, bias=False, dtype=torch.bfloat16, adapter_dtype=torch.float32, **options):
    """The launches of one forward and of one backward."""
    N, K = shape
    with gpu_stand_in() as launches:
        x = torch.empty(TOKENS, K, dtype=dtype, requires_grad=True)
        weight, grad_y = torch.empty(N, K, dtype=dtype), torch.empty(TOKENS, N, dtype=dtype)
        lora_A, lora_B, magnitude = (
            torch.empty(*size, dtype=adapter_dtype, requires_grad=True) for size in ((R, K), (N, R), (N,))
        )
        y = dk.dora_linear(
            x, weight, lora_A, lora_B, magnitude, scaling=2.0, bias=torch.empty(N, dtype=dtype) if bias else None,
            space=space, impl="triton", training=True, **options,
        )  # fmt: skip
        forward = launches.copy()
        launches.clear()
        torch.autograd.grad(y, (x, lora_A, lora_B, magnitude), grad_y)
        return forward, launches.copy()


@pytest.mark.parametrize("R", [16, 32, 64, 384], ids="r{}".format)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("space", ["token", "weight"])
def test_budget(space, shape, bias, R):
    forward, backward = layer_launches(shape, R, space=space, bias=bias)
    # In weight space h is made in the backward.
    most = {"token": (5, 7), "weight": (4, 7)}[space]
    assert len(forward) <= most[0], forward
    assert len(backward) <= most[1] + (R > 32), backward


@pytest.mark.parametrize("R", [16, 64], ids="r{}".format)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_bias_in_fp32_costs_no_pass(shape, R):
    forward, backward = layer_launches(shape, R, space="token", bias=True, dtype=torch.float32)
    assert len(forward) <= 5, forward
    assert len(backward) <= (7 if R <= 32 else 8), backward
    assert {name for name in forward + backward if not name.endswith("_kernel")} <= {"mm", "addmm", "addmm_"}


@pytest.mark.parametrize("mode", ["lora", "peft"])
@pytest.mark.parametrize("R", [16, 64], ids="r{}".format)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_budget_with_dropout(bias, R, mode):
    # PEFT's meaning multiplies by W once more each way: that product is not overhead of ours.
    more = 2 if mode == "peft" else 1
    forward, backward = layer_launches(
        SHAPES["qo_proj"], R, space="token", bias=bias, lora_dropout=0.1, dropout_mode=mode
    )
    assert len(forward) <= 5 + more, forward
    assert len(backward) <= (8 if R <= 32 else 9) + more, backward


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("R", [16, 64], ids="r{}".format)
@pytest.mark.parametrize("space", ["token", "weight"])
def test_nothing_but_kernels_and_matrix_products(space, R, bias):
    forward, backward = layer_launches(SHAPES["qo_proj"], R, space=space, bias=bias)
    # A bias added after the product was saved is the one pass that PyTorch makes for us.
    allowed = {"mm", "addmm_"} | ({"add"} if space == "weight" and bias else set())
    assert {name for name in forward + backward if not name.endswith("_kernel")} <= allowed


@pytest.mark.parametrize("space", ["token", "weight"])
def test_adapters_in_the_inputs_dtype_cost_no_more(space):
    forward, backward = layer_launches(SHAPES["qo_proj"], 16, space=space, adapter_dtype=torch.bfloat16)
    assert len(forward) <= 5, forward
    assert len(backward) <= 8, backward


def test_a_product_in_fp32_is_one_call_on_a_gpu():
    launches = []
    with FakeTensorMode(), _CountOps(launches), torch.no_grad():
        a, b = (torch.empty(64, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        assert mm_fp32(a, b).dtype == torch.float32
    assert launches == ["mm"]


def test_the_counter_counts():
    with gpu_stand_in() as launches:
        x = torch.empty(4, 4)
        (x.t() @ x).add_(1.0).to(torch.bfloat16)
    assert launches == ["mm", "add_", "_to_copy"]
