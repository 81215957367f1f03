"""FSDP2 around decoder layers with our adapters, in two processes on a CPU, against one: `fully_shard` in a loop of its
own (`tests.support.shard_training`), and the command, which is told that it may (`tests.support.two_shards`)."""

import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dora_kernels as dk
from tests.support.shard_training import CONFIG, STEPS, adapted, train
from tests.support.tiny_models import llama, logits
from tests.support.training_runs import data, metrics, numbers, run  # noqa: F401
from tests.support.two_shards import FLAGS
from tests.tolerances import AFTER_ADAM, SAME_FP32
from training import demo
from training.checkpoints.checkpoint import damage

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):  # noqa: F811
    """The folder of `tests.support.two_shards`, and what was said there, where each process's half is asserted."""
    folder = tmp_path_factory.mktemp("runs")
    words = [sys.executable, "-m", "tests.support.two_shards", str(data), str(folder)]
    launched = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    return folder, launched.stdout


@pytest.fixture(scope="module")
def state(runs):
    """Losses and state dict that `fully_shard` in a loop of its own left."""
    folder, _ = runs
    return load_file(folder / "state.safetensors")


def test_sharded_training_is_training_in_one(state):
    one = adapted()
    losses = train(one, lambda tokens: tokens)
    assert losses.unique().numel() == STEPS, "it trains"
    torch.testing.assert_close(state["losses"], losses, rtol=SAME_FP32, atol=0)


def test_the_full_state_dict_loads_in_one_process(state, tmp_path):
    tensors = {name: tensor for name, tensor in state.items() if name != "losses"}
    model = dk.apply_dora(llama(), CONFIG)
    assert model.load_state_dict(tensors).missing_keys == []
    dk.save_adapter(model, tmp_path)
    read = dk.load_adapter(llama(), tmp_path)
    expected = adapted()
    train(expected, lambda tokens: tokens)
    torch.testing.assert_close(logits(read.eval()), logits(expected.eval()), rtol=AFTER_ADAM, atol=AFTER_ADAM)
    assert not torch.allclose(logits(read), logits(llama()), rtol=1e-2, atol=1e-2), "something was learned"


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):  # noqa: F811
    """One process with the same global batch."""
    folder = tmp_path_factory.mktemp("one")
    run(data, folder, **FLAGS | {"batch_size": 2})
    return folder


@pytest.mark.slow
def test_the_command_sharded_is_the_command_in_one(runs, one):
    folder, _ = runs
    sharded = metrics(folder / "whole")
    assert [row["step"] for row in sharded] == [row["step"] for row in metrics(one)] != []
    for row, other in zip(sharded, metrics(one)):
        for name in {"loss", "eval_loss", "grad_norm"} & {*row}:
            assert row[name] == pytest.approx(other[name], rel=SAME_FP32), (row["step"], name)
    assert {path.name for path in (folder / "whole").iterdir()} == {path.name for path in one.iterdir()}


@pytest.mark.slow
def test_what_is_saved_is_whole(runs, one):
    folder, _ = runs
    checkpoint = folder / "whole" / "checkpoint-4"
    assert damage(checkpoint) is None
    for file in (WEIGHTS, "training_state.safetensors"):
        sharded, expected = load_file(checkpoint / file), load_file(one / "checkpoint-4" / file)
        assert sharded.keys() - expected.keys() <= {"1.random.cpu"} and expected.keys() <= sharded.keys()
        for name, tensor in expected.items():
            if tensor.is_floating_point():
                # Of the largest value, as zeros have no relative error.
                assert (sharded[name] - tensor).abs().max() <= AFTER_ADAM * tensor.abs().max(), name
    model = dk.load_adapter(AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=torch.float32), checkpoint)
    tensors = load_file(folder / "whole" / WEIGHTS)
    layer = model.model.layers[1].mlp.up_proj
    assert torch.equal(layer.lora_B, tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"])


@pytest.mark.slow
def test_a_sharded_run_resumes_exactly(runs):
    folder, said = runs
    assert said.count("resuming from") == 1
    assert numbers(metrics(folder / "resumed")) == numbers(metrics(folder / "whole"))
    for file in (WEIGHTS, "checkpoint-4/training_state.safetensors"):
        assert (folder / "resumed" / file).read_bytes() == (folder / "whole" / file).read_bytes()


@pytest.mark.slow
def test_launched_by_accelerate_with_a_bf16_base_of_which_one_process_reads(runs):
    """That its fp32 adapters stay so is asserted there."""
    folder, said = runs
    assert "14 layers fused, 2 MLPs as one function each; base in bfloat16 on cpu, in 2 processes" in said
    before, after = (row["eval_loss"] for row in metrics(folder / "launched") if "eval_loss" in row)
    assert after < before - 1
    base = AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder / "launched")
    tensors = load_file(folder / "launched" / WEIGHTS)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    assert len(tensors) == 42 and {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    stored = tensors["base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"]
    assert torch.equal(layer.lora_magnitude_vector["default"].weight, stored)


@pytest.mark.slow
def test_a_nan_in_one_process_of_a_sharded_run_stops_both(runs):
    _, said = runs
    named, other = sorted((line for line in said.splitlines() if " said error: " in line), reverse=True)
    assert "process 1 said error: the loss of step 1" in named and "embed_tokens was the first layer to go" in named
    assert "process 0 said error: the loss of step 1" in other and "is not finite in another process" in other
