"""The guards catch what they are for: each test has a kernel or a call that is wrong on purpose."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from tests.support.buffers import LAYOUTS, count_launches, guard_bands, guard_launches

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.uint8]


@triton.jit
def _copy_kernel(x_ptr, y_ptr, x_count, y_count, stride_x, stride_y, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride_x, mask=offs < x_count, other=0)
    tl.store(y_ptr + offs * stride_y, x, mask=offs < y_count)


@triton.jit
def _sum_kernel(x_ptr, y_ptr, count, shift, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + shift + offs, mask=offs < count, other=0)
    tl.store(y_ptr, tl.sum(x, axis=0))


def _copy(x, *, read=None, written=None):
    y = torch.empty_like(x)
    _copy_kernel[(1,)](x, y, read or len(x), written or len(x), x.stride(0), y.stride(0), BLOCK=64)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_right_kernel_passes(dtype, device):
    x = torch.arange(50, device=device).to(dtype)
    with guard_bands() as guard:
        y = _copy(guard(x))
    assert torch.equal(y, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("read", [50, 51], ids=["write-only", "read-and-write"])
def test_a_write_past_the_end_is_caught(read, dtype, device):
    """Also when what is written was read from the input's own band."""
    x = torch.arange(50, device=device).to(dtype)
    with (
        pytest.raises(AssertionError, match="1 elements written outside it, from offset 50 to 50"),
        guard_bands() as guard,
    ):
        _copy(guard(x), read=read, written=51)


def test_a_write_into_a_gap_is_caught(device):
    with pytest.raises(AssertionError, match="outside it, from offset 1 to 49"), guard_bands() as guard:
        x, y = guard(torch.ones(50, device=device)), torch.empty_strided((50,), (2,), device=device)
        _copy_kernel[(1,)](x, y, 50, 50, 1, 1, BLOCK=64)


@pytest.mark.parametrize(
    ("count", "shift"), [(50, 0), (51, 0), (50, -1)], ids=["right", "past-the-end", "before-the-start"]
)
def test_a_stray_read_poisons_the_result(count, shift, device):
    x = torch.ones(50, device=device)
    with guard_bands() as guard:
        y = torch.zeros(1, device=device)
        _sum_kernel[(1,)](guard(x), y, count, shift, BLOCK=64)
    assert y.item() == 50 if (count, shift) == (50, 0) else y.isnan().item()


@pytest.mark.parametrize("written", [False, True], ids=["input", "in-place"])
def test_a_written_input_is_caught_unless_declared(written, device):
    x = torch.arange(50.0, device=device)
    outcome = nullcontext() if written else pytest.raises(AssertionError, match="though it is an input")
    with outcome, guard_bands() as guard:
        inside = guard(x, written=written)
        _copy_kernel[(1,)](guard(torch.ones_like(x)), inside, 50, 50, 1, 1, BLOCK=64)
    assert torch.equal(x, torch.arange(50.0, device=device)), "the caller's own tensor is never touched"


ALLOCATE = {
    "empty": lambda x: torch.empty(5, 7, dtype=x.dtype, device=x.device),
    "empty_like": lambda x: torch.empty_like(x),
    "empty_strided": lambda x: torch.empty_strided((5, 7), (9, 1), dtype=x.dtype, device=x.device),
    "new_empty": lambda x: x.new_empty(5, 7),
    "new_empty_strided": lambda x: x.new_empty_strided((5, 7), (1, 6)),
    "zeros": lambda x: torch.zeros(5, 7, dtype=x.dtype, device=x.device),
    "zeros_like": lambda x: torch.zeros_like(x),
    "new_zeros": lambda x: x.new_zeros(5, 7),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ALLOCATE)
def test_every_allocator_is_banded(name, dtype, device):
    plain = ALLOCATE[name](torch.ones(5, 7, dtype=dtype, device=device))
    with pytest.raises(AssertionError, match=f"output of {name}, .*from offset -1 to -1"), guard_bands() as guard:
        out = ALLOCATE[name](guard(torch.ones(5, 7, dtype=dtype, device=device)))
        assert (out.shape, out.stride(), out.dtype) == (plain.shape, plain.stride(), plain.dtype)
        assert out.data_ptr() % 16 == 0
        assert (out == 0).all() if "zeros" in name else out.isnan().all()
        out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(1)
    assert type(torch.empty(1).storage_offset()) is int and torch.empty(1).storage_offset() == 0, "patches are undone"


def test_empty_tensors_and_gradients_pass_through():
    with guard_bands() as guard:
        assert guard(torch.empty(0, 3)).shape == (0, 3)
        x = guard(torch.ones(3, requires_grad=True))
        x.square().sum().backward()
    assert x.is_leaf and torch.equal(x.grad, torch.full((3,), 2.0))


def test_launches_are_counted_by_name(device):
    x = torch.ones(50, device=device)
    with count_launches() as launches:
        _copy(x)
        _copy(x)
        _sum_kernel[(1,)](x, torch.zeros(1, device=device), 50, 0, BLOCK=64)
    _copy(x)
    assert launches == {"_copy_kernel": 2, "_sum_kernel": 1}


def test_compiled_launches_are_counted_and_warmups_are_not():
    compiled = JITFunction(_copy_kernel.fn)
    with patch.object(JITFunction, "run", lambda self, *args, **kwargs: None), count_launches() as launches:
        compiled[(1,)](None)
        compiled.run(None, grid=(1,), warmup=True)
    assert launches == {"_copy_kernel": 1}


def test_a_guarded_launch_computes_what_a_plain_one_does():
    x = torch.arange(50.0).view(10, 5)[:, 1]
    y = torch.full((20,), torch.nan)[::2]
    with guard_launches() as launches:
        _copy_kernel[(1,)](x, y, 10, 10, 5, 2, BLOCK=64)
        _copy_kernel[(1,)](y, y, 10, 10, 2, 2, BLOCK=64)
    assert launches == {"_copy_kernel": 2} and torch.equal(y, x)


@pytest.mark.parametrize(("read", "written"), [(50, 51), (51, 51)], ids=["write", "read-and-write"])
def test_a_guarded_launch_tells_of_a_stray_write(read, written):
    """Into memory that the caller owns too, where nothing else would show it."""
    x, y = torch.arange(100.0)[:50], torch.zeros(100)[:50]
    expected = "_copy_kernel: .*1 elements written outside it, from offset 50 to 50"
    with pytest.raises(AssertionError, match=expected), guard_launches():
        _copy_kernel[(1,)](x, y, read, written, 1, 1, BLOCK=64)


def test_a_guarded_launch_poisons_a_stray_read():
    x, y = torch.ones(100)[:50], torch.zeros(1)
    with guard_launches():
        _sum_kernel[(1,)](x, y, 51, 0, BLOCK=64)
    assert y.isnan()


@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 4), (2, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_shape_and_values(layout, shape):
    plain = torch.randn(shape)
    laid_out = LAYOUTS[layout](plain)
    assert torch.equal(laid_out, plain[:1].expand(shape) if layout == "expanded" else plain)
    with guard_bands() as guard:
        guarded = guard(laid_out)
        assert guarded.stride() == laid_out.stride() and torch.equal(guarded, laid_out)


EXPECTED_STRIDES = {
    "contiguous": (6, 1),
    "transposed": (1, 5),
    "sliced": (14, 1),
    "expanded": (0, 1),
    "step_two": (12, 2),
    "offset_view": (6, 1),
    "channels_like": (2, 10),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_what_they_say(layout):
    laid_out = LAYOUTS[layout](torch.randn(5, 6))
    assert laid_out.stride() == EXPECTED_STRIDES[layout]
    assert (laid_out.data_ptr() % 16 == 0) == (layout not in ("sliced", "offset_view"))


def test_a_kernel_that_assumes_a_layout_is_caught():
    """One that ignores strides, as kernels do, reads the poison between the elements."""
    wrong = []
    for name, lay_out in LAYOUTS.items():
        x = torch.arange(48.0).view(6, 8)
        with guard_bands() as guard:
            y = torch.zeros(1)
            _sum_kernel[(1,)](guard(lay_out(x)), y, 48, 0, BLOCK=64)
        if y.item() != x.sum():
            wrong.append(name)
    # A sum is the same in any order, so a transposed tensor passes.
    assert wrong == ["sliced", "expanded", "step_two", "channels_like"]
