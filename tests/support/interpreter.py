"""Makes Triton's interpreter agree with the GPU, for tests only: tests/conftest.py installs it.

The interpreter (TRITON_INTERPRET=1) runs kernels on numpy arrays, and numpy has no bfloat16: Triton carries the raw bit
patterns as uint16 and forgets that in most places. What is wrong in Triton 3.6 to 3.9, and what stands here instead:

| operation                          | interpreter                           | here, as on the GPU                    |
|------------------------------------|---------------------------------------|----------------------------------------|
| fp32 -> bf16                       | truncates; some NaN become infinite   | nearest even; NaN stays NaN            |
| fp64, int -> bf16                  | the number becomes the bit pattern    | nearest even, rounded once             |
| bf16 -> fp32                       | subnormals become other values        | exact                                  |
| fp32 -> bf16/fp16, rtz             | wrong at overflow, subnormals and NaN | toward zero                            |
| + - * % < > = and unary on bf16    | on bit patterns                       | in fp32, rounded once                  |
| tl.dot, tl.fma on bf16             | on bit patterns                       | exact products, wider accumulator      |
| tl.dot on fp32, tf32 (the default) | full fp32                             | operands cut to 10 mantissa bits       |
| tl.maximum/minimum/clamp with NaN  | NaN wins (until 3.9)                  | NaN loses unless propagate_nan asks    |
| reduce, scan over bf16 or fp16     | bit patterns; fp16 sums in fp32       | raises: convert to tl.float32 first    |
| tl.sum                             | one by one, except on the last axis   | a tree, with a tree's rounding error   |
| range(n), n a kernel argument      | raises (3.6 with numpy 2.4)           | a loop                                 |
| Python floats as kernel arguments  | stay double, never promote            | fp32 scalars, or as annotated          |

Still not the GPU: a * b + c is never fused, / and tl.sqrt are exact, and the trees of sums are others.
"""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    ReduceOps,
    ReduceScanOpInterface,
    TensorHandle,
)
from triton.runtime.jit import _normalize_ty

from tests.support import interpreter_types

SCALAR_TYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}


def is_bf16(handle):
    """Whether the data are bf16 bit patterns. The results of comparisons keep their operands' dtype, but hold bools."""
    return handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16


def decode(handle):
    """The numbers a handle stands for: bf16 as fp32 (exact), every other type as it is."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if is_bf16(handle) else handle.data


def encode(values, dtype):
    """A handle of `dtype` holding `values`, rounded once to nearest even."""
    if dtype == tl.bfloat16:
        return TensorHandle(_bf16_bits(values), dtype)
    # Overflow to infinity is what the GPU does too, and no reason for a warning.
    with np.errstate(over="ignore", invalid="ignore"):
        return TensorHandle(values.astype(triton_interpreter._get_np_dtype(dtype)), dtype)


def _bf16_bits(values):
    if values.dtype != np.float32:
        values = _round_to_odd(values.astype(np.float64))
    bits = values.view(np.uint32)
    # Half an ulp less one, plus the last bit kept: ties go to even.
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # 0x7FFF is CUDA's canonical NaN.
    return np.where(np.isnan(values), 0x7FFF, nearest).astype(np.uint16)


def _round_to_odd(values):
    """fp64 to fp32 such that a further rounding to bf16 equals a single one.

    cvt.rn.bf16.f64 (sm_90) rounds once, and so does Triton's code for sm_80; PyTorch on CPU rounds twice, through fp32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = values.astype(np.float32)
    bits = nearest.view(np.uint32)
    toward_zero = bits - (np.abs(nearest) > np.abs(values))
    return np.where(nearest == values, bits, np.where(np.isnan(values), bits, toward_zero | 1)).view(np.float32)


def _cast_impl(self, src, dst_type):
    return encode(decode(src), dst_type.scalar)


def _create_fp_to_fp(self, src, dst_type, rounding_mode):
    dtype = dst_type.scalar
    if rounding_mode != ir.ROUNDING_MODE.RTZ or dtype not in (tl.bfloat16, tl.float16):
        return STOCK[InterpreterBuilder, "create_fp_to_fp"](self, src, dst_type, rounding_mode)
    values, nearest = decode(src), encode(decode(src), dtype)
    # The patterns of one sign are in order, so one less is one step toward zero (from infinity: the largest number).
    bits = nearest.data.view(np.uint16) - (np.abs(decode(nearest)) > np.abs(values))
    return TensorHandle(bits.astype(np.uint16).view(nearest.data.dtype), dtype)


def _binary_op(self, lhs, rhs, op):
    if not is_bf16(lhs):
        return STOCK[InterpreterBuilder, "binary_op"](self, lhs, rhs, op)
    # fp32 has more than twice bf16's bits plus two, so rounding its result to bf16 equals rounding once.
    values = op(decode(lhs), decode(rhs))
    return encode(values, tl.int1 if values.dtype == np.bool_ else tl.bfloat16)


def _unary_op(self, arg, op):
    return encode(op(decode(arg)), arg.dtype.scalar)


def _create_fma(self, x, y, z):
    if z.data.dtype == np.float64:
        return STOCK[InterpreterBuilder, "create_fma"](self, x, y, z)
    # Products of 24-bit numbers are exact in fp64; its sum leaves one rounding that matters.
    exact = decode(x).astype(np.float64) * decode(y) + decode(z)
    return encode(exact, z.dtype.scalar)


def _create_clampf(self, arg, lo, hi, propagate_nans):
    if propagate_nans == ir.PROPAGATE_NAN.ALL:
        return STOCK[InterpreterBuilder, "create_clampf"](self, arg, lo, hi, propagate_nans)
    return self.binary_op(self.binary_op(arg, lo, np.fmax), hi, np.fmin)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    if a.dtype.primitive_bitwidth == 8:
        return STOCK[InterpreterBuilder, "create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
    a_data, b_data = decode(a), decode(b)
    if input_precision == ir.INPUT_PRECISION.TF32 and a_data.dtype == np.float32 and not is_bf16(a):
        a_data, b_data = _cut_to_tf32(a_data), _cut_to_tf32(b_data)
    acc_dtype = d.data.dtype
    return TensorHandle(np.matmul(a_data.astype(acc_dtype), b_data.astype(acc_dtype)) + d.data, d.dtype.scalar)


def _cut_to_tf32(values):
    """The tensor core reads the upper 19 bits of an fp32 operand."""
    return (values.view(np.uint32) & 0xFFFFE000).view(np.float32)


def _check_tensor(self, input):
    for arg in input:
        if arg.dtype in (tl.bfloat16, tl.float16):
            raise TypeError(
                f"reduction over {arg.dtype}: the GPU rounds after each step, in an order of its own, "
                "and the interpreter cannot follow; convert to tl.float32 first"
            )
    return STOCK[ReduceScanOpInterface, "check_tensor"](self, input)


def _sum(self, input):
    """As lanes and warps add: in a sum of n equal numbers log n roundings meet, and not n."""
    data = input.handle.data
    if data.dtype.kind != "f" or self.axis is None:
        return STOCK[ReduceOps, "sum"](self, input)
    parts = np.moveaxis(data, self.axis, 0)
    while len(parts) > 1:  # the lengths of blocks are powers of two
        half = len(parts) // 2
        parts = parts[:half] + parts[half:]
    return self.to_tensor(np.expand_dims(parts[0], self.axis) if self.keep_dims else parts[0], input.dtype)


def _init_args_hst(self, args_dev, kwargs):
    """A float argument reaches a compiled kernel as an fp32 scalar, which promotes bf16 and rounds a double."""
    args_hst, kwargs_hst = STOCK[GridExecutor, "_init_args_hst"](self, args_dev, kwargs)

    def scalar(name, arg):
        if not isinstance(arg, float) or name in self.constexprs:
            return arg
        dtype = SCALAR_TYPES.get(_normalize_ty(self.fn.__annotations__.get(name, "fp32")), tl.float32)
        return tl.tensor(encode(np.array([arg]), dtype), dtype)

    named = [scalar(name, arg) for name, arg in zip(self.arg_names, args_hst, strict=False)]
    # Surplus arguments stay, so that Python's own error about them is not lost.
    return named + args_hst[len(named) :], {name: scalar(name, arg) for name, arg in kwargs_hst.items()}


def _patch_lang_tensor(tensor, scope):
    STOCK[triton_interpreter, "_patch_lang_tensor"](tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _call_device_function(self, *args, **kwargs):
    """Triton patches its language again for each call of a device function, two thirds of all time, though the launch
    that is under way has patched what the function sees, but for `core` in Triton's own library."""
    if tl.core.is_builtin(tl.core.arange) and any(value is tl.core for value in self.fn.__globals__.values()):
        return STOCK[InterpretedFunction, "__call__"](self, *args, **kwargs)
    return self.rewrite()(*args, **kwargs)


REPLACEMENTS = {
    (InterpretedFunction, "__call__"): _call_device_function,
    (InterpreterBuilder, "cast_impl"): _cast_impl,
    (InterpreterBuilder, "create_fp_to_fp"): _create_fp_to_fp,
    (InterpreterBuilder, "binary_op"): _binary_op,
    # Reached by negation since 3.9.
    (InterpreterBuilder, "unary_op"): _unary_op,
    (InterpreterBuilder, "create_fma"): _create_fma,
    (InterpreterBuilder, "create_clampf"): _create_clampf,
    (InterpreterBuilder, "create_maxnumf"): lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax),
    (InterpreterBuilder, "create_minnumf"): lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin),
    (InterpreterBuilder, "create_dot"): _create_dot,
    # Absent before 3.9, where tl.full(..., tl.bfloat16) and bf16 * 0.5 therefore raise.
    (InterpreterBuilder, "get_bf16"): lambda self, value: encode(np.array([value], np.float32), tl.bfloat16),
    (ReduceScanOpInterface, "check_tensor"): _check_tensor,
    (ReduceOps, "sum"): _sum,
    (GridExecutor, "_init_args_hst"): _init_args_hst,
    (triton_interpreter, "_patch_lang_tensor"): _patch_lang_tensor,
    **interpreter_types.REPLACEMENTS,
}
STOCK = {(owner, name): owner.__dict__.get(name) for owner, name in REPLACEMENTS}
STOCK_OPTIONS = triton_interpreter.interpreter_builder.options


def install():
    """Puts the replacements into Triton's interpreter; a second call changes nothing."""
    for (owner, name), replacement in REPLACEMENTS.items():
        setattr(owner, name, replacement)
    # Its overflow checks compute every integer operation twice and can only fire in debug mode, which is off.
    triton_interpreter.interpreter_builder.options = replace(STOCK_OPTIONS, sanitize_overflow=False)


@contextmanager
def stock_interpreter():
    """Triton's own interpreter, to show what is wrong with it."""
    for (owner, name), stock in STOCK.items():
        if stock is not None:
            setattr(owner, name, stock)
        elif name in owner.__dict__:
            delattr(owner, name)
    triton_interpreter.interpreter_builder.options = STOCK_OPTIONS
    try:
        yield
    finally:
        install()
