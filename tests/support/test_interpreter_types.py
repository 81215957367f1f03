"""The types of the faster interpreter are Triton's own: answers and errors are those of the stock interpreter."""

from itertools import product

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import TensorHandle

from tests.support.interpreter import stock_interpreter
from tests.support.interpreter_types import Shape

POINTERS = [tl.pointer_type(tl.float32), tl.pointer_type(tl.bfloat16), tl.pointer_type(tl.float32, const=True)]
SCALARS = [tl.int1, tl.int32, tl.uint32, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.float64]
SHAPES = [(), (1,), (16,), (1, 16), (4, 1), (4, 16), (16, 4), (2, 4, 16), (3,), (2**21,)]


def answer(question):
    """What `question()` returns, or the error that it raises, as something comparable."""
    try:
        return question()
    except Exception as error:
        return type(error).__name__, str(error)


def both(question):
    """The stock interpreter's answer and the faster one's."""
    with stock_interpreter():
        stock = answer(question)
    return stock, answer(question)


def said(type):
    """All that a type says of itself."""
    if not type.is_block():
        return str(type)
    return str(type), type.scalar, type.get_block_shapes().values, type.numel, type.nbytes, type.mangle()


def block(scalar, shape):
    """A tensor of ones; a scalar without a shape."""
    type = tl.block_type(scalar, list(shape)) if shape else scalar
    data = np.ones(shape or 1, triton_interpreter._get_np_dtype(type))
    return tl.tensor(TensorHandle(data, scalar), type)


def described(tensor):
    """All that a tensor says of itself, and the numpy type of its numbers."""
    sizes = [size.value for size in tensor.shape]
    numbers = tensor.handle.data
    return said(tensor.type), sizes, tensor.numel.value, tensor.dtype, numbers.shape, numbers.dtype


@pytest.mark.parametrize("sequence", [list, tl.tuple, lambda shape: [tl.constexpr(size) for size in shape]])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_types(shape, sequence):
    for scalar in SCALARS + POINTERS:
        stock, fast = both(lambda scalar=scalar: said(tl.block_type(scalar, sequence(shape))))
        assert fast == stock


@pytest.mark.parametrize("shape", SHAPES[:8], ids=str)
def test_tensors(shape):
    for scalar in SCALARS + POINTERS:
        stock, fast = both(lambda scalar=scalar: described(block(scalar, shape)))
        assert fast == stock


def test_types_are_equal_where_tritons_are():
    types = [tl.block_type(scalar, [size]) for scalar in SCALARS for size in (4, 16)]
    types += SCALARS + POINTERS + [tl.pointer_type(tl.float32), tl.dtype("fp32"), tl.constexpr(tl.float32), 3, None]
    stock, fast = both(lambda: [bool(one == other) for one, other in product(types, types)])
    assert fast == stock and any(fast) and not all(fast)


@pytest.mark.parametrize("div_or_mod", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:8], ids=str)
def test_operands_are_converted_and_broadcast(shape, div_or_mod):
    """Scalars, pointers and blocks, of each two types and shapes."""
    types = SCALARS + POINTERS[:2] if shape in ((), (4, 16)) else [tl.int32, tl.float16, tl.bfloat16]
    for one, other, another in product(types, types, SHAPES[:8]):

        def converted(one=one, other=other, another=another):
            operands = block(one, shape), block(other, another)
            convert = triton_interpreter.interpreter_semantic.binary_op_type_checking_impl
            return [described(operand) for operand in convert(*operands, True, True, True, div_or_mod)]

        stock, fast = both(converted)
        assert fast == stock, (one, other, another)


def test_equal_shapes_are_one_object():
    """Or nothing here is faster."""
    one, other = tl.block_type(tl.int32, [4, 16]), tl.block_type(tl.float32, tl.tuple([4, tl.constexpr(16)]))
    assert type(one.shape) is Shape and one.shape is other.shape
