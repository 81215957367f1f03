"""Merging adapters over NF4 weights: into the dequantised base, or into the original one."""

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import dora_kernels as dk
from tests.models import test_qdora
from tests.models.test_qdora import CONFIG, LAYERS, SHAPE, TARGETS, VOCAB, batches, load, randomise, train
from tests.support.nf4 import decoded
from tests.support.oracle import relative_error
from tests.tolerances import ORACLE_FP32

folder = test_qdora.folder


def trained(folder, targets=TARGETS, **options):
    model = dk.apply_dora(load(folder, **options), dk.DoraConfig(**CONFIG, target_modules=targets)).train()
    train(model, steps=6)
    return model.eval()


@torch.no_grad()
def logits_of(model):
    return model(batches(1)[0]).logits


@pytest.mark.parametrize("targets", [TARGETS, ["q_proj"]], ids=["all", "one"])
def test_merging_into_the_dequantised_base_keeps_the_logits(folder, tmp_path, targets):
    """All of the model is dense then, what was not adapted too, so that it can be saved and loaded as any other."""
    model = trained(folder, targets)
    expected = logits_of(model)
    merged = dk.merge_dora(model, base="dequantized")
    assert not [m for m in merged.modules() if isinstance(m, (dk.DoraLinear, bnb.nn.Linear4bit))]
    assert relative_error(logits_of(merged), expected) <= ORACLE_FP32
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(loaded.config, "quantization_config", None) is None
    assert torch.equal(logits_of(loaded), logits_of(merged))


def test_merging_into_the_original_weights_says_what_it_costs(folder, caplog):
    model = trained(folder)
    expected, layer = logits_of(model), model.model.layers[0].self_attn.q_proj
    original = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).model.layers[0].self_attn.q_proj.weight
    )
    adapted = original.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    truth = layer.magnitude.double()[:, None] * adapted / adapted.norm(dim=1, keepdim=True)
    with caplog.at_level("INFO", logger="dora_kernels.models.merge"):
        merged = dk.merge_dora(model, base=str(folder))
    assert relative_error(merged.model.layers[0].self_attn.q_proj.weight, truth) <= 2**-8
    # The quantisation's own error, about a tenth, is many times the update of so short a training.
    assert 0.01 < relative_error(logits_of(merged), expected) < 0.5
    said = [record.getMessage() for record in caplog.records]
    assert sum("merging into the original weight costs" in line for line in said) == 7 * LAYERS
    assert any("or into the dequantised base" in line for line in said)


def test_unmerging_gives_back_the_packed_weights(folder):
    model = trained(folder, ["q_proj", "up_proj"])
    expected, classes = logits_of(model), [type(m) for m in model.modules()]
    quantization = model.config.quantization_config
    dk.merge_dora(model, base="dequantized", keep_base=True)
    dk.unmerge_dora(model)
    assert torch.equal(logits_of(model), expected)
    assert [type(m) for m in model.modules()] == classes and model.config.quantization_config is quantization


@pytest.mark.parametrize(
    "base, said",
    [
        (None, r'has a quantised weight, .* pass base="dequantized"'),
        ("elsewhere", r"has no dense weight .* not the original model"),
    ],
    ids=["no_choice", "another_model"],
)
def test_a_merge_without_a_valid_choice_is_refused(folder, tmp_path, base, said):
    model = trained(folder)
    if base is not None:
        config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=1, **SHAPE | {"intermediate_size": 192})
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        base = str(tmp_path)
    expected = logits_of(model)
    with pytest.raises(ValueError, match=said):
        dk.merge_dora(model, base=base)
    assert torch.equal(logits_of(model), expected)


def test_merging_into_the_dequantised_base_in_a_dtype(folder, tmp_path):
    """Also what was not adapted, and what was never quantised, whatever the model computes in."""
    model = trained(folder, ["q_proj"])
    attention = model.model.layers[0].self_attn
    expected = attention.q_proj.merged_weight(torch.bfloat16)
    other = decoded(attention.k_proj.weight).float().bfloat16()
    merged = dk.merge_dora(model, base="dequantized", dtype=torch.bfloat16)
    attention = merged.model.layers[0].self_attn
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(attention.q_proj.weight, expected) and torch.equal(attention.k_proj.weight, other)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == torch.bfloat16 and torch.equal(logits_of(loaded), logits_of(merged))


def test_a_base_that_was_saved_in_nf4_is_merged_and_saved_dense(folder, tmp_path):
    """transformers 5.23 cannot save what it loaded so: it has no way back from bitsandbytes' tensors."""
    load(folder).save_pretrained(tmp_path / "nf4")
    model = dk.apply_dora(AutoModelForCausalLM.from_pretrained(tmp_path / "nf4"), dk.DoraConfig(**CONFIG))
    randomise(model)
    merged = dk.merge_dora(model.eval(), base="dequantized")
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert torch.equal(logits_of(loaded), logits_of(merged))
