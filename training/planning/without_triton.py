"""The engine's kernels where Triton is missing: their launchers allocate as ever, and launch nothing."""

import importlib
import sys
from types import ModuleType
from typing import NamedTuple
from unittest import mock


class Dtype(NamedTuple):
    """One of Triton's types, or whatever else of its language a kernel's signature names."""

    name: str
    primitive_bitwidth: int = 0


class Constant(NamedTuple):
    """A module's constant."""

    value: object


class Kernel:
    """What a launcher launches."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


def kernels() -> ModuleType:
    """`dora_kernels.ops.kernels`, imported over what stands for Triton. Nothing else may compute with it."""
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    bits = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}
    vars(language).update({name: Dtype(name, size) for name, size in bits.items()})
    language.__getattr__ = Dtype
    language.constexpr = Constant
    triton.language = language
    triton.jit = lambda function=None, **options: Kernel() if function else lambda function: Kernel()
    with mock.patch.dict(sys.modules, {"triton": triton, "triton.language": language}):
        found = importlib.import_module("dora_kernels.ops.kernels")
        of_engine = {name: module for name, module in sys.modules.items() if name.startswith("dora_kernels.")}
    sys.modules.update(of_engine)
    return found
