"""`pytest -m gpu --rehearse-gpu`: the tests of a GPU on a CPU, at small sizes, under the interpreter.

The test functions are the very ones. A stand-in answers for CUDA (`bench.day.stand_in_gpu`): nothing is compiled, and
memory and streams are only asked for. Sizes beyond 512 are divided by 16 until they are not, and odd ones stay odd.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

LARGEST = 512
ADDRESSES = {"row", "column", "strides"}
"""Parameters that are no sizes."""


def shrunk(value):
    """A size small enough for the interpreter; sizes in tuples and lists, too; anything else as it is."""
    if isinstance(value, tuple | list) and all(isinstance(part, int) for part in value):
        return type(value)(map(shrunk, value))
    if type(value) is not int:
        return value
    while value > LARGEST:
        value = value // 16 | value & 1
    return value


def shrink_parameters(items) -> None:
    """Of the collected tests that are marked `gpu`."""
    for item in items:
        if item.get_closest_marker("gpu") and hasattr(item, "callspec"):
            params = item.callspec.params
            params.update({name: shrunk(value) for name, value in params.items() if name not in ADDRESSES})


@contextmanager
def rehearsed_gpu(module):
    """Inside, tests of `module` have a GPU, and the problems that they make are small."""
    # It imports Triton.
    from bench.day.stand_in_gpu import stand_in_gpu

    def small(make):
        return lambda *sizes, **options: make(*map(shrunk, sizes), **options)

    replaced = {}
    if hasattr(module, "make_problem"):
        replaced["make_problem"] = small(module.make_problem)
    if hasattr(module, "ADDRESSABLE"):
        replaced["ADDRESSABLE"] = module.ADDRESSABLE >> 15
    with stand_in_gpu() as gpu, ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(module, name, value))
        yield gpu
