"""FSDP2 by `fully_shard` around decoder layers with our adapters, in two processes on a CPU, against one."""

import pytest
import torch
from safetensors.torch import load_file

import dora_kernels as dk
from tests.shard_training import CONFIG, STEPS, adapted, train
from tests.tiny_models import llama, logits
from tests.two_processes import torchrun


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What the two processes left; that the parameters are DTensors is asserted there."""
    file = tmp_path_factory.mktemp("sharded") / "state.safetensors"
    launched = torchrun("tests.shard_training", file)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    return load_file(file)


def test_sharded_training_is_training_in_one(sharded):
    one = adapted()
    losses = train(one, lambda tokens: tokens)
    assert losses.unique().numel() == STEPS, "it trains"
    # fp32 sums in another order, over four steps of Adam: the bound of the contract.
    torch.testing.assert_close(sharded["losses"], losses, rtol=1e-5, atol=0)


def test_the_full_state_dict_loads_in_one_process(sharded, tmp_path):
    state = {name: tensor for name, tensor in sharded.items() if name != "losses"}
    model = dk.apply_dora(llama(), CONFIG)
    assert model.load_state_dict(state).missing_keys == []
    dk.save_adapter(model, tmp_path)
    read = dk.load_adapter(llama(), tmp_path)
    expected = adapted()
    train(expected, lambda tokens: tokens)
    # Four steps of Adam, whose divisions by small moments amplify fp32's last bits.
    torch.testing.assert_close(logits(read.eval()), logits(expected.eval()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(read), logits(llama()), rtol=1e-2, atol=1e-2), "something was learned"
