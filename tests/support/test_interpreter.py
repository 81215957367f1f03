"""The interpreter computes what the GPU computes, bit for bit; `pytest -m gpu` puts the same questions to a GPU.

The oracle is PyTorch; from fp64, where its CPU code rounds twice, it is the nearer of two neighbours.
"""

import warnings

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.support.bits import COUNT, assert_same_bits, awkward, neighbours, rounded_once
from tests.support.interpreter import stock_interpreter

CASTS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.int32, torch.bfloat16),
]


def _name(value):
    return getattr(value, "__name__", str(value)).removeprefix("torch.")


@triton.jit
def _cast_kernel(x_ptr, y_ptr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "half":
        out = x * 0.5
    elif OP == "less":
        out = tl.where(x < y, x, y)
    elif OP == "equal":
        out = tl.where(x == y, x, tl.full((BLOCK,), 3.0, x.dtype))
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "minimum":
        out = tl.minimum(x, y)
    elif OP == "clamp":
        out = tl.clamp(x, -1.0, 2.0)
    elif OP == "fma":
        out = tl.fma(x, y, x)
    tl.store(out_ptr + offs, out)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a = tl.load(a_ptr + rows * BLOCK + cols)
    b = tl.load(b_ptr + rows * BLOCK + cols)
    c = tl.load(c_ptr + rows * BLOCK + cols)
    tl.store(c_ptr + rows * BLOCK + cols, tl.dot(a, b, c, input_precision=PRECISION, out_dtype=c_ptr.dtype.element_ty))


@triton.jit
def _reduce_kernel(x_ptr, y_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    if OP == "sum":
        y = tl.sum(x, axis=0)
    elif OP == "sum_fp32":
        y = tl.sum(x.to(tl.float32), axis=0)
    elif OP == "max":
        y = tl.max(x, axis=0)
    tl.store(y_ptr, y)


@triton.jit
def _columns_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offs = tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + offs[None, :])
    tl.store(y_ptr + offs, tl.sum(x, axis=0))


@triton.jit
def _count_kernel(y_ptr, n):
    total = 0
    for i in range(0, n, 2):
        total += i
    tl.store(y_ptr, total)


@triton.jit
def _scale_kernel(x_ptr, y_ptr, scale, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) * scale)


@triton.jit
def _scale_fp64_kernel(x_ptr, y_ptr, scale: tl.float64, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) * scale)


def _run_cast(x, dtype, rounding=None):
    out = torch.empty_like(x, dtype=dtype)
    _cast_kernel[(COUNT // 1024,)](x, out, ROUNDING=rounding, BLOCK=1024)
    return out


@pytest.mark.parametrize(("src", "dst"), CASTS, ids=[f"{_name(s)}-{_name(d)}" for s, d in CASTS])
def test_cast(src, dst, device):
    x = awkward(src, device)
    assert_same_bits(_run_cast(x, dst), x.to(dst))


@pytest.mark.parametrize("dst", [torch.bfloat16, torch.float16], ids=_name)
def test_cast_from_fp64_rounds_once(dst, device):
    x = awkward(torch.float64)
    expected = rounded_once(x, dst)
    assert (expected != x.to(dst)).sum() > 100, "these inputs no longer tell single from double rounding"
    assert_same_bits(_run_cast(x.to(device), dst).cpu(), expected)


@pytest.mark.parametrize("src", [torch.float32, torch.float64], ids=_name)
@pytest.mark.parametrize("dst", [torch.bfloat16, torch.float16], ids=_name)
def test_cast_toward_zero(src, dst, device):
    if device == "cuda" and src == torch.float64:
        pytest.skip("Triton compiles fp_downcast_rounding from fp32 only")
    x = awkward(src)
    below, above = neighbours(x, dst)
    assert_same_bits(_run_cast(x.to(device), dst, "rtz").cpu(), torch.where(x.signbit(), above, below))


TORCH_OPS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, y: (x.float() / y.float()).to(x.dtype),
    # Triton negates as 0 - x.
    "neg": lambda x, y: 0 - x,
    "abs": lambda x, y: x.abs(),
    "half": lambda x, y: x * 0.5,
    "less": lambda x, y: torch.where(x < y, x, y),
    "equal": lambda x, y: torch.where(x == y, x, 3.0),
    "maximum": torch.fmax,
    "minimum": torch.fmin,
    "clamp": lambda x, y: torch.fmin(torch.fmax(x, x.new_tensor(-1.0)), x.new_tensor(2.0)),
    "fma": lambda x, y: rounded_once(x.double() * y.double() + x.double(), x.dtype),
}


def _operands(dtype):
    """Pairs of any two patterns, of patterns near each other, and of equal ones."""
    x, y = awkward(dtype), awkward(dtype)[torch.randperm(COUNT)]
    y[:2048] = x[:2048] * (1 + torch.randn(2048) / 8).to(dtype)
    y[2048:3072] = x[2048:3072]
    # One NaN for all: C's fmax, and so PyTorch's, lets a signalling NaN win.
    return (torch.where(t.isnan(), torch.nan, t) for t in (x, y))


@pytest.mark.parametrize("op", TORCH_OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_name)
def test_arithmetic(op, dtype, device):
    if device == "cuda" and op == "div":
        pytest.skip("the GPU's / is an approximation; kernels use tl.div_rn")
    x, y = _operands(dtype)
    if op in ("maximum", "minimum"):
        # Which of +0 and -0 wins is left open by IEEE.
        x, y = (torch.where(t == 0, 1.0, t) for t in (x, y))
    expected = TORCH_OPS[op](x, y)
    out = torch.empty_like(x, device=device)
    _arithmetic_kernel[(COUNT // 1024,)](x.to(device), y.to(device), out, OP=op, BLOCK=1024)
    assert_same_bits(out.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=_name)
def test_dot(dtype, device):
    """Integers times powers of two, chosen so that every partial sum is exact: no order of summation can differ."""
    a, b = ((torch.randint(-127, 128, (64, 64)) * 2.0 ** torch.randint(-2, 1, (64, 1))).to(dtype) for _ in range(2))
    acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    b, start = b.T.contiguous(), torch.randint(-99, 99, (64, 64)).to(acc_dtype)
    out = start.clone().to(device)
    _dot_kernel[(1,)](a.to(device), b.to(device), out, PRECISION="ieee", BLOCK=64)
    assert_same_bits(out.cpu(), a.to(acc_dtype) @ b.to(acc_dtype) + start)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee", None])
def test_dot_shows_tf32(precision, device):
    """A kernel that forgets input_precision loses 13 bits of an fp32 operand, here as on the GPU."""
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    out = torch.zeros(64, 64, device=device)
    _dot_kernel[(1,)](a.to(device), b.to(device), out, PRECISION=precision, BLOCK=64)
    exact = a.double() @ b.double()
    error = ((out.cpu() - exact).norm() / exact.norm()).item()
    assert (error > 1e-4) == (precision in ("tf32", None)), error
    assert error < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_name)
def test_reductions(dtype, device):
    x = torch.randint(-64, 64, (128,)).to(dtype)
    out = torch.empty(1, device=device)
    _reduce_kernel[(1,)](x.to(device), out, OP="sum_fp32", BLOCK=128)
    assert out.item() == x.float().sum().item()
    _reduce_kernel[(1,)](x.to(device), out, OP="max", BLOCK=128)
    assert out.item() == x.float().max().item()


def test_a_sum_is_a_tree(device):
    """Added one by one to 2²⁴, which has no place for them, 127 ones would all be lost."""
    x = torch.ones(128, 16)
    x[0] = 2.0**24
    out = torch.empty(16, device=device)
    _columns_kernel[(1,)](x.to(device), out, ROWS=128, COLUMNS=16)
    assert (out > 2**24 + 64).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_name)
def test_sum_in_16_bits_is_refused(dtype):
    x = torch.ones(128, dtype=dtype)
    with pytest.raises(InterpreterError, match=r"convert to tl\.float32 first"):
        _reduce_kernel[(1,)](x, torch.empty_like(x), OP="sum", BLOCK=128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=_name)
def test_a_float_argument_is_an_fp32_scalar(dtype, device):
    x = torch.randn(128).to(dtype)
    out = torch.empty(128, dtype=torch.float64, device=device)
    _scale_kernel[(1,)](x.to(device), out, 0.1, BLOCK=128)
    wider = torch.float64 if dtype == torch.float64 else torch.float32
    assert_same_bits(out.cpu(), (x.to(wider) * torch.tensor(0.1, dtype=torch.float32).to(wider)).double())


def test_a_float_argument_follows_its_annotation(device):
    x = torch.randn(128, dtype=torch.float64)
    out = torch.empty(128, dtype=torch.float64, device=device)
    _scale_fp64_kernel[(1,)](x.to(device), out, scale=0.1, BLOCK=128)
    assert_same_bits(out.cpu(), x * 0.1)


def test_a_loop_may_end_at_an_argument(device):
    out = torch.empty(1, dtype=torch.int32, device=device)
    _count_kernel[(1,)](out, 7)
    assert out.item() == 2 + 4 + 6


def test_overflow_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _run_cast(torch.full((COUNT,), 1e6), torch.float16).isinf().all()


STOCK_FAULTS = {
    "fp32-to-bf16": lambda: test_cast(torch.float32, torch.bfloat16, "cpu"),
    "bf16-to-fp32": lambda: test_cast(torch.bfloat16, torch.float32, "cpu"),
    "fp64-to-bf16": lambda: test_cast_from_fp64_rounds_once(torch.bfloat16, "cpu"),
    "toward-zero": lambda: test_cast_toward_zero(torch.float32, torch.float16, "cpu"),
    "mul": lambda: test_arithmetic("mul", torch.bfloat16, "cpu"),
    "less": lambda: test_arithmetic("less", torch.bfloat16, "cpu"),
    "dot": lambda: test_dot(torch.bfloat16, "cpu"),
    "tf32": lambda: test_dot_shows_tf32("tf32", "cpu"),
    "tree": lambda: test_a_sum_is_a_tree("cpu"),
    "sum": lambda: test_sum_in_16_bits_is_refused(torch.bfloat16),
    "float-argument": lambda: test_a_float_argument_is_an_fp32_scalar(torch.float64, "cpu"),
}


@pytest.mark.parametrize("check", STOCK_FAULTS.values(), ids=STOCK_FAULTS)
def test_checks_fail_without_the_shim(check):
    """These checks can fail; once Triton mends a fault, this says which replacement can go."""
    with stock_interpreter(), pytest.raises((AssertionError, InterpreterError, pytest.fail.Exception)):
        check()
    check()
