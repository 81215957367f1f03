"""Merging fused experts: the plain model again, in place, one expert at a time, and back to the last bit."""

import logging

import pytest
import torch

import dora_kernels as dk
from dora_kernels.layers.experts import DoraExperts, adapted_experts
from dora_kernels.ops import chunked
from tests.models.test_experts import adapted
from tests.support.allocations import Allocations
from tests.support.oracle import relative_error
from tests.support.tiny_experts import BATCH, FAMILIES, tiny_experts
from tests.tolerances import MERGED_LOGITS

FP32 = torch.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merged_model_is_plain_and_computes_the_same(name):
    model = adapted(name, FP32)
    expected = model(BATCH).logits
    merged = dk.merge_dora(model)
    assert not adapted_experts(merged) and merged.state_dict().keys() == tiny_experts(name).state_dict().keys()
    assert all(m.config is merged.config for m in merged.modules() if hasattr(m, "is_transposed"))
    assert (merged(BATCH).logits - expected).abs().max() <= MERGED_LOGITS[FP32] * expected.abs().max()


def test_what_rounding_costs_is_logged_and_said_where_it_is_more_than_the_update(caplog):
    model = adapted("Mixtral", torch.bfloat16)
    stacks = list(adapted_experts(model))
    with caplog.at_level(logging.INFO):
        dk.merge_dora(model)
    costs = {record.args[0] + "." + record.args[1]: record.args[2] for record in caplog.records}
    assert costs.keys() == set(stacks) and all(1e-3 < cost < 1e-1 for cost in costs.values())
    model = adapted("Mixtral", torch.bfloat16)
    for adapter in adapted_experts(model).values():
        with torch.no_grad():
            adapter.lora_B.zero_()
            adapter.magnitude.copy_(adapter.weight_norm().norm * (1 + 1e-4))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        dk.merge_dora(model)
    assert "costs more than the whole update in 4 of 4 layers" in caplog.text


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_a_merge_makes_no_second_stack(name, monkeypatch):
    """The largest fresh tensor has the size of one expert's weight: gate's and up's."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 64)
    model = adapted(name, FP32)
    with Allocations() as made:
        dk.merge_dora(model)
    assert max(torch.Size(shape).numel() for shape, _ in made.made) == 2 * 24 * 16


def test_unmerging_is_bit_exact():
    model = adapted("gpt-oss", FP32)
    before, expected = {name: p.clone() for name, p in model.named_parameters()}, model(BATCH).logits
    dk.merge_dora(model, keep_base=True)
    assert not adapted_experts(model)
    dk.unmerge_dora(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())
    assert torch.equal(model(BATCH).logits, expected)


def interrupted(monkeypatch, after):
    """Lets the merge of an expert fail once, after so many."""
    merge, calls = DoraExperts.merged_expert, []

    def failing(self, *args):
        calls.append(args)
        if len(calls) == after:
            raise MemoryError
        return merge(self, *args)

    monkeypatch.setattr(DoraExperts, "merged_expert", failing)


def test_a_merge_that_stopped_half_way_goes_on(monkeypatch):
    model = adapted("Mixtral", FP32)
    expected = model(BATCH).logits
    interrupted(monkeypatch, after=21)
    with pytest.raises(MemoryError):
        dk.merge_dora(model)
    for _ in range(2):
        assert (model(BATCH).logits - expected).abs().max() <= MERGED_LOGITS[FP32] * expected.abs().max()
        if adapted_experts(model):
            dk.merge_dora(model)
    assert not adapted_experts(model)


def test_with_the_base_kept_it_is_put_back(monkeypatch):
    model = adapted("Mixtral", FP32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    interrupted(monkeypatch, after=21)
    with pytest.raises(MemoryError):
        dk.merge_dora(model, keep_base=True)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_streamed_weights_are_the_merged_ones(name):
    model = adapted(name, FP32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    streamed = dict(dk.merged_weights(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    expected = dk.merge_dora(model).state_dict()
    assert streamed.keys() == expected.keys() and all(torch.equal(streamed[k], expected[k]) for k in expected)
    half = dict(dk.merged_weights(adapted(name, FP32), dtype=torch.bfloat16))
    stack = "model.layers.0.mlp.experts.down_proj"
    assert half[stack].dtype == torch.bfloat16 and relative_error(half[stack], expected[stack]) <= 1e-2


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_a_merge_in_another_dtype_is_one_rounding_of_the_merge_in_fp32(name):
    exact = dk.merge_dora(adapted(name, FP32)).state_dict()
    model = adapted(name, FP32)
    for adapter in adapted_experts(model).values():
        adapter.rounding = "nearest"
    merged = dk.merge_dora(model, dtype=torch.bfloat16)
    assert not adapted_experts(merged) and {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert all(torch.equal(tensor, exact[key].to(tensor.dtype)) for key, tensor in merged.state_dict().items())
