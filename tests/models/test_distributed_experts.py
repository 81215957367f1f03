"""Adapters of fused experts in two processes on a CPU, against one: `tests.support.distributed_experts`."""

import pytest
import torch
from safetensors.torch import load_file

from tests.support.distributed_experts import adapted_mixtral
from tests.support.shard_training import STEPS, train
from tests.support.two_processes import torchrun
from tests.tolerances import SAME_FP32


@pytest.fixture(scope="module")
def one():
    losses = train(adapted_mixtral(), lambda tokens: tokens)
    assert losses.unique().numel() == STEPS, "it trains"
    return losses


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launched = torchrun("tests.support.distributed_experts", folder)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    return load_file(folder / "losses.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(two, one, wrapper):
    torch.testing.assert_close(two[wrapper], one, rtol=SAME_FP32, atol=0)
