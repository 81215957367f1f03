"""The plan against counted allocations of a real step."""

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

import dora_kernels as dk
from tests.support.live_bytes import count
from tests.support.marks import slow
from tests.support.planned import FORMAT_SIZES, OTHERS, RANK, SIZES
from tests.tolerances import PLAN
from training import memory_model
from training.memory_model import planned_model, predict
from training.planning import losses


def assert_predicted(
    config, batch_size, cutoff_len, *, base_format="", checkpointing=False, loss="whole", keep=False, **options
):
    """`options` are `DoraConfig`'s."""
    step = {"checkpointing": checkpointing, "loss": loss, "keep": keep}
    before, peak = count(config, batch_size, cutoff_len, base_format=base_format, **step, **options)
    plan = predict(
        planned_model(config, dk.DoraConfig(**{"r": RANK} | options), base_format=base_format),
        batch_size=batch_size,
        cutoff_len=cutoff_len,
        activation_checkpointing=checkpointing,
        loss=loss,
        keep_weights=keep,
    )
    static = plan.weights + plan.adapters + plan.gradients + plan.optimizer
    # bitsandbytes' tables and Adam's step counters are left out.
    assert static == pytest.approx(before, rel=0.01)
    # Without the weights, in whose shadow an error could hide.
    assert plan.peak - static == pytest.approx(peak - before, rel=PLAN)


@pytest.mark.parametrize("shape", [(1, 128), (2, 128), (4, 96)], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("base_format", ["", "nf4"], ids=["dense", "nf4"])
def test_the_peak_of_a_step(base_format, checkpointing, shape):
    assert_predicted(LlamaConfig(**SIZES), *shape, base_format=base_format, checkpointing=checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("base_format", ["", "nf4"], ids=["dense", "nf4"])
def test_the_peak_of_a_step_without_blocks(base_format, checkpointing):
    step = {"base_format": base_format, "checkpointing": checkpointing}
    assert_predicted(LlamaConfig(**SIZES), 2, 128, fuse_blocks=False, **step)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config])
def test_other_models(config, checkpointing):
    """Qwen2 has biases, before which the product is kept; Qwen3 normalises each head."""
    assert_predicted(config(**SIZES | {"num_key_value_heads": 4}, head_dim=16), 2, 128, checkpointing=checkpointing)


SLOW = ("gpt_neox", "mixtral")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "config", [slow(config) if name in SLOW else config for name, config in OTHERS.items()], ids=OTHERS
)
def test_any_family(config, checkpointing):
    assert_predicted(config, 2, 128, checkpointing=checkpointing)


def test_experts_with_adapters():
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert_predicted(OTHERS["mixtral"], 2, 128, target_modules=["q_proj"], target_parameters=stacks, r=8)


def test_what_lies_outside_the_decoder():
    """An adapted head is merged for the loss, an adapted embedding has a gradient that the first layer passes on."""
    assert_predicted(LlamaConfig(**SIZES), 2, 128, target_modules=["lm_head", "embed_tokens", "q_proj"])


@pytest.mark.parametrize(
    ("base_format", "intermediate_size", "tokens"), [("", 512, 256), ("nf4", 1024, 128)], ids=["dense", "nf4"]
)
def test_few_tokens_for_the_weight(base_format, intermediate_size, tokens):
    """Dense weights run in token space and a norm's backward is the highest; of NF4 it is W' beside the tokens' own."""
    sizes = {"hidden_size": 512, "intermediate_size": intermediate_size, "num_hidden_layers": 1}
    assert_predicted(LlamaConfig(**SIZES | sizes), 1, tokens, base_format=base_format, checkpointing=True)


def test_tied_embeddings_count_once():
    assert_predicted(LlamaConfig(**SIZES | {"tie_word_embeddings": True}), 1, 128)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("loss", memory_model.LOSSES)
def test_losses_over_a_large_vocabulary(loss, checkpointing, monkeypatch):
    """The vocabulary of 4000 makes the loss the larger part; TRL's tile is cut down in proportion."""
    if loss == "tiled":
        kernels = pytest.importorskip("trl.kernels.chunked_logprob", reason="TRL is not installed")
        from trl.trainer import utils

        assert (kernels.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE) == losses.TRL_TILE
        monkeypatch.setattr(losses, "TRL_TILE", (4096, 1024))
        monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 1024)
        for module in (kernels, utils):  # or it runs PyTorch's operations, with more of them alive
            monkeypatch.setattr(module, "_use_triton", lambda device: True)
        # One GEMM on a GPU, which accumulates in place.
        monkeypatch.setattr(kernels, "_addmm_fp32", lambda total, a, b: total)
    assert_predicted(LlamaConfig(**SIZES | {"vocab_size": 4000}), 2, 128, checkpointing=checkpointing, loss=loss)


@pytest.mark.parametrize(
    ("base_format", "merge_aware"),
    [
        ("fp8", False),
        ("int4", False),
        ("fp8", True),
        *(slow(*case) for case in (("nvfp4", False), ("mxfp4", False), ("nf4", True), ("", True))),
    ],
)
def test_the_peak_of_a_step_over_a_format(base_format, merge_aware):
    step = {"base_format": base_format, "merge_aware": merge_aware, "checkpointing": merge_aware}
    assert_predicted(LlamaConfig(**SIZES | FORMAT_SIZES), 2, 128, **step)


@pytest.mark.parametrize(
    ("base_format", "checkpointing"), [("", False), ("nf4", True), slow("", True), slow("nf4", False)], ids=str
)
def test_the_peak_of_a_micro_step_that_finds_merged_weights(base_format, checkpointing):
    assert_predicted(LlamaConfig(**SIZES), 2, 128, keep=True, base_format=base_format, checkpointing=checkpointing)
