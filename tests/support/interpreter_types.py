"""Makes Triton's interpreter faster, for tests only: tests/support/interpreter.py installs it.

Triton gives each result a type, and half of an interpreted kernel's time went into those types. Here equal shapes are
one object, checked once and compared by identity. What a kernel computes stays the same.
"""

from functools import cache

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as triton_interpreter

_STOCK_EQUAL = tl.dtype.__eq__
_STOCK_NP_DTYPE = triton_interpreter._get_np_dtype
_STOCK_BROADCAST = TritonSemantic.broadcast_impl_value
_STOCK_CONVERT = TritonSemantic.binary_op_type_checking_impl


class Shape(tl.tuple):
    """The sizes of a block, with what a type and a tensor of it need."""

    def __init__(self, sizes):
        if not sizes:
            raise TypeError("0d block_type is forbidden")
        self.numel = tl.core.validate_block_shape(sizes)
        super().__init__(sizes)
        self.text = str(self)
        self.of_tensor = tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(self.numel)

    def __eq__(self, other):
        return tl.constexpr(other is self or self.values == list(other))

    __hash__ = tl.tuple.__hash__


_shape_of = cache(Shape)
_NO_SHAPE = tl.tuple([]), tl.constexpr(1)
_np_dtypes = {}


def _init_block_type(self, element_ty, shape):
    if type(shape) is not Shape:
        shape = _shape_of(tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape))
    self.element_ty, self.shape, self.numel = element_ty, shape, shape.numel
    self.name = f"<{shape.text}, {element_ty}>"


def _init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.shape.of_tensor if type.is_block() else _NO_SHAPE


def _equal(self, other):
    return self is other or _STOCK_EQUAL(self, other)


def _get_np_dtype(type):
    """Triton's own builds its table anew at each call."""
    name = type.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _STOCK_NP_DTYPE(type)
    return _np_dtypes[name]


def _broadcast(self, lhs, rhs):
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
        return lhs, rhs
    return _STOCK_BROADCAST(self, lhs, rhs)


def _convert(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
    """Two tensors of one type stay as they are, but for / and %, which widen fp16 and bf16."""
    tensors = isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor)
    if tensors and lhs.dtype is rhs.dtype and type(lhs.dtype) is tl.dtype and not div_or_mod:
        return self.broadcast_impl_value(lhs, rhs)
    return _STOCK_CONVERT(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)


REPLACEMENTS = {
    (tl.block_type, "__init__"): _init_block_type,
    (tl.tensor, "__init__"): _init_tensor,
    (tl.dtype, "__eq__"): _equal,
    (triton_interpreter, "_get_np_dtype"): _get_np_dtype,
    (TritonSemantic, "broadcast_impl_value"): _broadcast,
    (TritonSemantic, "binary_op_type_checking_impl"): _convert,
}
