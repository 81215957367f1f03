"""Memory that tells: guard bands around every buffer, a count of kernel launches, and seven layouts of one tensor.

Triton's interpreter reads and writes any address it is given, and a GPU does so within an allocation's page, so a wrong
mask goes unnoticed until it corrupts a neighbour. Between guard bands it reads NaN, or leaves a mark.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

# Elements before and behind each buffer. A stray block of 128 rows of 128 still lands in it; a multiple of 16 bytes
# keeps the alignment of torch.empty.
BAND = 128 * 128
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_POSITIVE_INFINITY = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF << 52,
}
# Captured here because guard_bands() replaces torch.empty.
_EMPTY = torch.empty


def _guard_pattern(dtype, serial):
    """The bits of a band: a signalling NaN with a payload of its own, for integers a value of its own near the minimum.

    A NaN read from a band and stored past the end of another buffer must not look like that buffer's own band: any
    arithmetic makes it quiet, and a plain copy carries the wrong payload.
    """
    payload = 1 + serial % 63
    if dtype.is_floating_point:
        return _POSITIVE_INFINITY[dtype] + payload
    return 0x80 + payload if dtype.itemsize == 1 else torch.iinfo(_BITS[dtype.itemsize]).min + payload


def _written_once(tensor):
    """The tensor without its repetitions: a dimension of stride 0 cut to one element."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.size(dim) > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


class _Buffer:
    """band | elements of one tensor, and the gaps that its strides leave | band"""

    def __init__(self, like, label, serial):
        self.label, self.pattern = label, _guard_pattern(like.dtype, serial)
        span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        self.bits = torch.full((BAND + span + BAND,), self.pattern, dtype=_BITS[like.itemsize], device=like.device)
        # set_ and not as_strided: to autograd this is a tensor like any other, not a view of a larger one.
        self.tensor = _EMPTY(0, dtype=like.dtype, device=like.device)
        self.tensor.set_(self.bits.untyped_storage(), BAND, like.shape, like.stride())
        self.frozen = None

    def fill(self, source):
        with torch.no_grad():
            _written_once(self.tensor).copy_(_written_once(source))
        return self

    def freeze(self):
        self.frozen = self.bits.clone()
        return self

    def check(self):
        if self.frozen is not None:
            changed = self.bits != self.frozen
        else:
            changed = self.bits != self.pattern
            own = _EMPTY(0, dtype=torch.bool, device=changed.device)
            own.set_(changed.untyped_storage(), BAND, self.tensor.shape, self.tensor.stride())
            _written_once(own).zero_()
        where = (changed.nonzero().flatten() - BAND).tolist()
        if where:
            kind = "outside it" if self.frozen is None else "in or around it, though it is an input"
            raise AssertionError(
                f"{self.label}: {len(where)} elements written {kind}, from offset {where[0]} to {where[-1]}"
            )


class GuardBands:
    """What guard_bands() yields: call it on an input for a copy of the same shape, strides and dtype, between bands."""

    def __init__(self):
        self._buffers = []

    def __call__(self, tensor, *, written=False):
        """`written=True` for a tensor that the kernel may write in place; any other input must stay as it is."""
        if tensor.numel() == 0:
            return tensor
        buffer = self._add(tensor, "input").fill(tensor.detach())
        if not written:
            buffer.freeze()
        return buffer.tensor.requires_grad_(tensor.requires_grad)

    def check(self):
        """Raises AssertionError if a band, or an input that may not be written, has changed."""
        for buffer in self._buffers:
            buffer.check()

    def banded(self, allocate, zeroed):
        """The allocator `allocate` with bands around what it returns; NaN in it unless it is to be zero."""

        def allocate_banded(*args, **kwargs):
            plain = allocate(*args, **kwargs)
            # Size 0 has nothing to guard, and the interpreter itself asks for such tensors.
            if plain.numel() == 0 or plain.is_meta:
                return plain
            buffer = self._add(plain, f"output of {allocate.__name__}")
            if zeroed:
                buffer.fill(plain)
            return buffer.tensor.requires_grad_(plain.requires_grad)

        return allocate_banded

    def _add(self, like, kind):
        serial = len(self._buffers)
        label = f"buffer {serial} ({kind}, {list(like.shape)} {like.dtype})"
        self._buffers.append(_Buffer(like, label, serial))
        return self._buffers[-1]


@contextmanager
def guard_bands():
    """Within it every tensor that Python code allocates lies between guard bands; all bands are checked on leaving.

    with guard_bands() as guard:
        y = launcher(guard(x), guard(out, written=True))
    """
    guard = GuardBands()
    allocators = [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch, "zeros"),
        (torch, "zeros_like"),
    ]
    allocators += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided", "new_zeros")]
    with ExitStack() as stack:
        for owner, name in allocators:
            banded = guard.banded(getattr(owner, name), zeroed="zeros" in name)
            stack.enter_context(patch.object(owner, name, banded))
        yield guard
    guard.check()


@contextmanager
def poisoned_memory():
    """torch.empty and its kin return NaN (integers: the largest), so that an unwritten lane shows."""
    mode = torch.get_deterministic_debug_mode()
    # PyTorch fills fresh memory in deterministic mode only; warn_only keeps that mode from refusing other operations.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def count_launches():
    """Yields a Counter of Triton launches by kernel name, interpreted or compiled."""
    launches = Counter()

    def counted(run):
        def run_counted(self, *args, warmup, **kwargs):
            if not warmup:
                launches[self.fn.__name__] += 1
            return run(self, *args, warmup=warmup, **kwargs)

        return run_counted

    with ExitStack() as stack:
        for kind in (InterpretedFunction, JITFunction):
            stack.enter_context(patch.object(kind, "run", counted(kind.run)))
        yield launches


@contextmanager
def guard_launches():
    """Within it every Triton launch runs on copies of its tensors between guard bands, which are checked after each;
    yields a Counter of the launches by kernel name. Which tensors a kernel may write it does not know."""
    launches = Counter()

    def guarded(run):
        def run_guarded(self, *args, warmup, **kwargs):
            guard, copies = GuardBands(), {}

            def copy_of(value):
                if not isinstance(value, torch.Tensor) or value.numel() == 0:
                    return value
                # One tensor that is passed twice is still one: an output may lie over an input.
                key = value.data_ptr(), value.dtype, value.shape, value.stride()
                if key not in copies:
                    copies[key] = value, guard(value.detach(), written=True)
                return copies[key][1]

            result = run(self, *map(copy_of, args), warmup=warmup, **{k: copy_of(v) for k, v in kwargs.items()})
            launches[self.fn.__name__] += 1
            try:
                guard.check()
            except AssertionError as error:
                raise AssertionError(f"{self.fn.__name__}: {error}") from None
            for value, copy in copies.values():
                # Through .data: a kernel's writing is invisible to autograd.
                _written_once(value.data).copy_(_written_once(copy))
            return result

        return run_guarded

    with ExitStack() as stack:
        for function in (InterpretedFunction, JITFunction):
            stack.enter_context(patch.object(function, "run", guarded(function.run)))
        yield launches


def _gaps(tensor, *shape):
    """A buffer whose elements outside the tensor are poison: NaN, or the smallest integer."""
    fill = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
    return tensor.new_full(shape, fill)


def _transposed(tensor):
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor.contiguous()


def _sliced(tensor):
    wide = _gaps(tensor, *tensor.shape[:-1], tensor.shape[-1] + 8)
    return wide[..., 3:-5].copy_(tensor)


def _expanded(tensor):
    return tensor[:1].contiguous().expand_as(tensor)


def _step_two(tensor):
    return _gaps(tensor, *tensor.shape[:-1], 2 * tensor.shape[-1])[..., ::2].copy_(tensor)


def _offset_view(tensor):
    return _gaps(tensor, tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def _channels_like(tensor):
    first = tensor.movedim(-1, 0)
    return _gaps(tensor, *first.shape, 2)[..., 0].copy_(first).movedim(0, -1)


# name: tensor of one or more dimensions -> one of equal shape and, but for `expanded`, equal values, laid out that way.
LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    # The last two dimensions swapped in memory; one dimension has only one order.
    "transposed": _transposed,
    # Columns cut from wider rows: the row stride exceeds the row.
    "sliced": _sliced,
    # The first row repeated with stride 0, as the gradient of a sum arrives.
    "expanded": _expanded,
    # Every second element.
    "step_two": _step_two,
    # Contiguous, but not aligned to 16 bytes.
    "offset_view": _offset_view,
    # The last dimension outermost in memory, and no stride of 1.
    "channels_like": _channels_like,
}
