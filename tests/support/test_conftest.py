"""The shared fixtures do what they promise, and can fail."""

import os

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import skip_reason, wants_interpreter


@triton.jit
def _copy_some_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < count, other=0.0), mask=offs < count)


FRESH = {
    "empty": lambda x: torch.empty(8, dtype=x.dtype, device=x.device),
    "empty_like": torch.empty_like,
    "empty_strided": lambda x: torch.empty_strided((2, 4), (5, 1), dtype=x.dtype, device=x.device),
    "new_empty": lambda x: x.new_empty(8),
    "new_empty_strided": lambda x: x.new_empty_strided((8,), (2,)),
    "resize_": lambda x: x.new_empty(0).resize_(8),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("allocate", FRESH.values(), ids=FRESH)
def test_fresh_memory_is_nan(allocate, dtype, device):
    assert allocate(torch.ones(8, dtype=dtype, device=device)).isnan().all()


def test_fresh_integers_are_a_sentinel(device):
    assert (torch.empty(8, dtype=torch.int32, device=device) == torch.iinfo(torch.int32).max).all()


def test_an_unwritten_lane_shows(device):
    x = torch.ones(8, device=device)
    y = torch.empty_like(x)
    _copy_some_kernel[(1,)](x, y, 7, BLOCK=8)
    assert y.isnan().tolist() == [False] * 7 + [True]


def test_poison_leaves_training_alone():
    layer = torch.nn.Linear(4, 4)
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.weight.grad.isfinite().all()


_FIRST_DRAWS = []


@pytest.mark.parametrize("repeat", [0, 1], ids=["first", "second"])
def test_seeds_are_fixed(repeat):
    _FIRST_DRAWS.append(torch.rand(4).tolist())
    assert _FIRST_DRAWS[-1] == _FIRST_DRAWS[0]


_EXAMPLE_DRAWS = []


@given(st.integers(0, 100))
def test_hypothesis_seeds_torch(n):
    _EXAMPLE_DRAWS.append(torch.rand(4).tolist())
    assert _EXAMPLE_DRAWS[-1] == _EXAMPLE_DRAWS[0]


@pytest.mark.parametrize(
    ("markexpr", "cuda", "expected"),
    [
        ("", False, True),
        ("", True, True),
        ("gpu", False, True),
        ("gpu", True, False),
        ("gpu and not slow", True, False),
        ("not gpu", True, True),
    ],
    ids=["plain", "plain-on-gpu-machine", "gpu-asked-but-absent", "gpu", "gpu-expression", "gpu-deselected"],
)
def test_interpreter_is_off_only_for_gpu_runs(markexpr, cuda, expected):
    assert wants_interpreter(markexpr, cuda) is expected


def test_skip_reasons():
    assert "there is none" in skip_reason(interpreted=True, cuda=False)
    assert "pytest -m gpu" in skip_reason(interpreted=True, cuda=True)
    assert skip_reason(interpreted=False, cuda=True) is None


def test_kernels_are_bound_as_the_header_says():
    interpreted = os.environ["TRITON_INTERPRET"] == "1"
    assert (type(_copy_some_kernel).__name__ == "InterpretedFunction") is interpreted


@pytest.mark.gpu
def test_gpu_runs_compile(request):
    if request.config.option.rehearse_gpu:
        pytest.skip("a rehearsal compiles nothing")
    assert type(_copy_some_kernel).__name__ == "JITFunction"
