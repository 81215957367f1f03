"""What every test gets: an exact interpreter where there is no GPU, fixed seeds, and NaN in all fresh memory.

`pytest` runs the kernels under Triton's interpreter on CPU tensors and skips tests marked `gpu`. `pytest -m gpu`, on a
machine with a GPU, compiles them instead. One process cannot do both: a kernel is bound when it is decorated.
`pytest -m gpu --rehearse-gpu` runs the GPU's tests in small on a CPU.
"""

import gc
import os
import random
import re
import sys

import hypothesis
import numpy as np
import pytest
import torch

from tests.support.gpu_rehearsal import rehearsed_gpu, shrink_parameters

# No import of Triton up here: it decorates its own library when imported, so the choice must come first.


def wants_interpreter(markexpr, cuda):
    """Compiled kernels run only where a GPU is present and the `-m` expression asks for them."""
    asks_for_gpu = re.search(r"(?<!not )\bgpu\b", markexpr) is not None
    return not (cuda and asks_for_gpu)


def skip_reason(interpreted, cuda):
    """Why a test marked `gpu` cannot run here, or None if it can."""
    if not cuda:
        return "needs a CUDA GPU, and there is none here"
    return "this process runs the interpreter; use `pytest -m gpu`" if interpreted else None


def pytest_addoption(parser):
    parser.addoption(
        "--rehearse-gpu", action="store_true", help="run tests marked gpu on a CPU that stands in for one, in small"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: compiled kernels on a CUDA GPU; run them with `pytest -m gpu`")
    config.addinivalue_line("markers", "slow: left to the scorecard's row `slow`; run them with `pytest -m slow`")
    # numpy's, from within the interpreter: NaN and infinity are inputs here, and a GPU says nothing.
    config.addinivalue_line(
        "filterwarnings", "ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"
    )
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"
    # Beyond 32,768 elements PyTorch waits for its other threads: 8 ms an operation where two workers share two cores.
    torch.set_num_threads(1)
    if "triton" in sys.modules:
        raise pytest.UsageError("Triton was imported before tests/conftest.py could choose interpreter or GPU")
    if config.option.rehearse_gpu and torch.cuda.is_available():
        raise pytest.UsageError("--rehearse-gpu stands in for a GPU, and here is one: run `pytest -m gpu`")
    if wants_interpreter(config.option.markexpr, torch.cuda.is_available()):
        os.environ.setdefault("TRITON_INTERPRET", "1")
        from tests.support import interpreter

        interpreter.install()
    else:
        os.environ["TRITON_INTERPRET"] = "0"
        # Without it cuBLAS is not deterministic, and says so on each call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_finish():
    # Libraries are a million objects that live as long as the process: no collection need look through them again.
    gc.collect()
    gc.freeze()


def _interpreted():
    return os.environ["TRITON_INTERPRET"] == "1"


def pytest_report_header():
    return f"kernels: {'Triton interpreter, CPU' if _interpreted() else 'compiled'}"


def pytest_collection_modifyitems(config, items):
    if config.option.rehearse_gpu:
        shrink_parameters(items)
        return
    reason = skip_reason(_interpreted(), torch.cuda.is_available())
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


class _TorchRandom:
    """Lets Hypothesis seed torch before each example, so that a failing one fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# Hypothesis keeps a weak reference only.
_TORCH_RANDOM = _TorchRandom()
hypothesis.register_random(_TORCH_RANDOM)
# No deadline: the interpreter is slow and a busy machine slower.
hypothesis.settings.register_profile("dora", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("dora")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Runs the test twice: interpreted on CPU tensors, and compiled under `pytest -m gpu`."""
    return request.param


@pytest.fixture(autouse=True)
def _stand_in(request):
    if request.config.option.rehearse_gpu and request.node.get_closest_marker("gpu"):
        with rehearsed_gpu(request.module):
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    # Without a GPU `torch.manual_seed` writes down the stack for each kind of device: longer than many a test.
    (torch if torch.cuda.is_available() else torch.default_generator).manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    # It imports Triton.
    from tests.support.buffers import poisoned_memory

    with poisoned_memory():
        yield
