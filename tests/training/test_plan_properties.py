"""What the plan says of any model: the batch that fits, what it counts once, and what it leaves out."""

from unittest.mock import patch

import pytest
import torch
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MixtralConfig

import dora_kernels as dk
from dora_kernels.layers.accumulating import norm_uses
from tests.support.live_bytes import LiveBytes
from tests.support.planned import OTHERS, RANK, SIZES
from training import memory_model
from training.memory_model import planned_model, predict
from training.planning import step
from training.planning.nf4 import nf4_bytes


def test_nf4_is_4_127_bits_a_weight():
    assert nf4_bytes(4096 * 4096) * 8 / 4096**2 == pytest.approx(4.127, abs=5e-4)


def test_the_largest_batch_is_the_last_that_fits():
    planned = planned_model(LlamaConfig(**SIZES), dk.DoraConfig(r=RANK))
    step = {"cutoff_len": 128, "activation_checkpointing": True, "loss": "whole"}
    budget = 0.1 * memory_model.USABLE * 2**30
    batch = memory_model.largest_batch(planned, 0.1, **step)
    assert (
        predict(planned, batch_size=batch, **step).peak <= budget < predict(planned, batch_size=batch + 1, **step).peak
    )
    assert memory_model.largest_batch(planned, 1e-4, **step) == 0


def test_between_two_batches_nothing_is_counted():
    """Memory is a straight line there, moment for moment, and exactly so."""
    planned, again = (planned_model(OTHERS["gemma3"], dk.DoraConfig(r=RANK)) for _ in range(2))
    shape = {"cutoff_len": 64, "activation_checkpointing": True}
    for batch in (16, 48):
        predict(planned, batch_size=batch, **shape)
    with patch.object(step.CountedModel, "count", side_effect=AssertionError):
        between = predict(planned, batch_size=29, **shape)
    assert between == predict(again, batch_size=29, **shape)


def test_one_way_leaves_nothing_to_the_other():
    orders = (False, True), (True, False)
    first, second = (
        {way: predict(planned, batch_size=2, cutoff_len=64, activation_checkpointing=way) for way in order}
        for planned, order in zip([planned_model(LlamaConfig(**SIZES)) for _ in orders], orders)
    )
    assert first == second


def test_a_loop_over_tokens_is_not_counted(monkeypatch):
    monkeypatch.setattr(step, "MOST_OPERATIONS", 100)
    with pytest.raises(ValueError, match=r"of model type llama cannot be counted .* 100 operations"):
        predict(planned_model(LlamaConfig(**SIZES)), batch_size=1, cutoff_len=64)


@pytest.mark.parametrize(
    ("space", "targets"), [("weight", ["lm_head", "embed_tokens", "q_proj"]), ("token", ["q_proj"])], ids=str
)
def test_what_is_kept_over_micro_steps(space, targets):
    """An embedding keeps its norm alone, and so do layers in token space."""
    config, options = LlamaConfig(**SIZES), {"r": RANK, "target_modules": targets, "space": space}
    planned = planned_model(config, dk.DoraConfig(**options))
    plan = predict(planned, batch_size=1, cutoff_len=32, loss="whole", keep_weights=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    uses = norm_uses(dk.apply_dora(model, dk.DoraConfig(**options, impl="triton")).train())
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    with LiveBytes().as_on_a_gpu(), dk.accumulating(model, keep_weights=True):
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=tokens, labels=tokens).loss.backward()
        kept = [tensor for use in uses for tensor in tree_iter(use.kept_norm.norm)]
        weights = [use.kept_weight.merged for use in uses if use.kept_weight is not None]
    assert len(uses) == len(targets) + 2 and len(weights) == (4 if space == "weight" else 0)
    assert plan.kept == sum(tensor.nbytes for tensor in kept + weights)


def test_experts_keep_nothing_over_micro_steps():
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = MixtralConfig(**SIZES | {"num_hidden_layers": 1}, num_local_experts=4)
    planned = planned_model(config, dk.DoraConfig(r=8, target_modules=[], target_parameters=stacks))
    assert predict(planned, batch_size=1, cutoff_len=32, loss="whole", keep_weights=True).kept == 0


def test_what_differs_from_what_one_expects_is_said():
    (frozen,) = planned_model(OTHERS["mixtral"]).notes
    assert frozen.startswith("405,504 parameters of fused experts stay frozen: target_parameters=['mlp.experts.down")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    planned = planned_model(OTHERS["mixtral"], dk.DoraConfig(target_parameters=stacks))
    assert planned.notes == ["experts have tokens × top_k rows in a layer, however the router shares them out"]
    (idle,) = planned_model(LlamaConfig(**SIZES), dk.DoraConfig(exclude_modules=["lm_haed"])).notes
    assert idle == "`exclude_modules` ['lm_haed'] matches no module of the model: it excludes nothing"
    eager = Gemma2Config(**SIZES)
    assert "attention is eager: its scores are counted" in planned_model(eager).notes
