"""A kernel on a packed weight against its twin, between guard bands."""

import torch
from torch.utils._pytree import tree_leaves

from dora_kernels.ops import kernels, reference
from tests.support.buffers import guard_bands
from tests.support.oracle import relative_error
from tests.tolerances import TWIN


def guarded(guard, weight):
    """Its memory between guard bands; there are none for 8-bit floats, which are guarded as bytes."""

    def banded(tensor):
        if tensor.is_floating_point() and tensor.element_size() == 1:
            return guard(tensor.view(torch.uint8)).view(tensor.dtype)
        return guard(tensor)

    tensors = {name: t for name, t in weight._asdict().items() if isinstance(t, torch.Tensor) and t.ndim}
    return weight._replace(**{name: banded(t) for name, t in tensors.items()})


def compare(operation, weight, *arguments, **options):
    with guard_bands() as guard:
        banded = [guard(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        found = getattr(kernels, operation)(guarded(guard, weight), *banded, **options)
    expected = getattr(reference, operation)(weight, *arguments, **options)
    for ours, twin in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if twin is None:
            assert ours is None
            continue
        assert ours.dtype == twin.dtype and ours.shape == twin.shape
        assert relative_error(ours, twin) <= TWIN[twin.dtype]
