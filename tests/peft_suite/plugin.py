"""A pytest plugin that runs PEFT's own tests with the engine in every DoRA layer, and counts its work.

`pytest -p tests.peft_suite.plugin --engine reference`. A run in which layers fell back to PEFT unnoticed would pass, so
each test carries the number of calls that were fused, of those that PEFT computed, and of kernel launches.
"""

import os
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch

FP32_OF_LOGITS = 2e-6
"""The last bit of an fp32 number of up to 32."""


def pytest_addoption(parser):
    parser.addoption(
        "--engine", choices=["off", "reference", "triton"], default="off", help="what computes DoRA layers"
    )


def pytest_configure(config):
    config.stash[_STACK] = ExitStack()
    if config.option.engine == "triton":
        # Set by whoever started pytest: Triton decides when it is imported.
        assert os.environ.get("TRITON_INTERPRET") == "1"
        from tests.support import interpreter

        interpreter.install()
    config.stash[_COUNTS] = counts = Counter()
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        _start(config.stash[_STACK], config.option.engine, counts)


def pytest_unconfigure(config):
    config.stash[_STACK].close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    counts = item.config.stash[_COUNTS]
    before = counts.copy()
    try:
        with _fp32_bar() if "fsdp_wrapped" in item.name and item.config.option.engine != "off" else nullcontext():
            return (yield)
    finally:
        item.user_properties += [(name, number) for name, number in (counts - before).items()]


@contextmanager
def _fp32_bar():
    """Inside, `torch.allclose` admits the noise of fp32 sums.

    For tests that compare what FSDP left to PEFT with what is fused after loading, at a relative 1e-5, in
    log-probabilities near 0 of logits of up to 20. On some CPUs both sums agree to the bit, on others not.
    """
    exact = torch.allclose

    def allclose(input, other, rtol=1e-05, atol=1e-08, equal_nan=False):
        return exact(input, other, rtol=rtol, atol=max(atol, FP32_OF_LOGITS), equal_nan=equal_nan)

    with patch.object(torch, "allclose", allclose):
        yield


_STACK, _COUNTS = pytest.StashKey[ExitStack](), pytest.StashKey[Counter]()


def _start(stack, engine, counts):
    from peft.tuners.lora.dora import DoraEmbeddingLayer, DoraLinearLayer, _DoraConvNdLayer
    from triton.runtime.interpreter import InterpretedFunction

    import dora_kernels.peft.layer as peft_linear
    from dora_kernels.blocks import mlp, siblings
    from dora_kernels.peft import conv, embedding, patched_peft

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for owner, attribute, name in (
        (peft_linear, "dora_linear", "fused"),
        (mlp, "dora_mlp", "fused"),
        (siblings, "dora_siblings", "fused"),
        (conv, "dora_conv", "fused"),
        (embedding, "dora_embedding", "fused"),
        (DoraLinearLayer, "forward", "left_to_peft"),
        (DoraEmbeddingLayer, "forward", "left_to_peft"),
        (_DoraConvNdLayer, "forward", "left_to_peft"),
        (InterpretedFunction, "run", "launches"),
    ):
        stack.enter_context(patch.object(owner, attribute, counted(name, getattr(owner, attribute))))
    if engine != "off":
        stack.enter_context(patched_peft(impl=engine))
