"""A kernel beside its reference twin."""

import torch
from torch.utils._pytree import tree_leaves, tree_map

from dora_kernels.ops import kernels, reference
from tests.support.buffers import guard_bands
from tests.support.oracle import relative_error
from tests.tolerances import TWIN

DTYPES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16-fp32": (torch.float16, torch.float32),
    "fp16": (torch.float16, torch.float16),
}
"""(x and weight, adapter)."""


def compare(operation, *tensors, written=(), rounded=None, **options):
    """Runs the kernel on banded copies and the twin on the originals: all outputs, and the `written` arguments, are
    equal within the twin's tolerance, or that of values which were `rounded` to this type on the way. Returns ours."""
    with guard_bands() as guard:

        def banded(value, written=False):
            return tree_map(lambda t: guard(t, written=written) if isinstance(t, torch.Tensor) else t, value)

        arguments = [banded(value, position in written) for position, value in enumerate(tensors)]
        found = getattr(kernels, operation)(*arguments, **banded(options))
    twins = [t.clone() if position in written else t for position, t in enumerate(tensors)]
    expected = getattr(reference, operation)(*twins, **options)
    found, expected = (
        [*tree_leaves(returned), *(given[position] for position in written)]
        for returned, given in ((found, arguments), (expected, twins))
    )
    assert len(found) == len(expected)
    for position, (ours, twin) in enumerate(zip(found, expected)):
        if twin is None:
            assert ours is None, position
            continue
        assert ours.shape == twin.shape and ours.dtype == twin.dtype, position
        tolerance = max(TWIN[twin.dtype], TWIN[rounded or twin.dtype])
        assert relative_error(ours, twin) <= tolerance, (operation, position)
    return found
