"""The factors of tiny layers compared with what was kept by two programs."""

import importlib

import pytest
import triton.language as tl


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """A GPU's 256 are taken one by one by the interpreter, and of tiny factors all but the first see nothing.

    `tests/ops/test_kept_norm.py` and `test_kept_merge.py` hold the 256 to the reference.
    """
    # By name: the package has a function of the same name.
    module = importlib.import_module("dora_kernels.ops.kernels.kept_norm")
    monkeypatch.setattr(module, "PROGRAMS", tl.constexpr(2))
