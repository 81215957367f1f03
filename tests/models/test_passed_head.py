"""A loss that multiplies by the head's weight without calling the head: its adapter trains all the same."""

import copy

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

import dora_kernels as dk
from tests.support.images import trained
from tests.support.nf4 import linear_4bit
from tests.support.oracle import relative_error
from tests.support.tiny_models import VOCAB, llama
from tests.tolerances import SAME_FP32

TOKENS = torch.arange(14).reshape(2, 7) * 11 % VOCAB


def adapted(model=None, **options):
    config = dk.DoraConfig(**{"r": 2, "target_modules": ["q_proj", "lm_head"]} | options)
    return trained(dk.apply_dora(model or llama(), config)).train()


def gradients(model, **options):
    model.zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS, **options).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_gradients_are_those_of_the_logits(tied):
    model = adapted(llama(tied=tied))
    expected = gradients(model)
    add_fused_lm_head(model, outputs=("log_probs",))
    found = gradients(model, fused_lm_head=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any() and relative_error(found[name], value) <= SAME_FP32, name


def test_an_evaluation_has_the_adapters_loss_too():
    model = adapted().eval()
    with torch.no_grad():
        expected = model(input_ids=TOKENS, labels=TOKENS).loss
        add_fused_lm_head(model, outputs=("log_probs",))
        found = model(input_ids=TOKENS, labels=TOKENS, fused_lm_head=True).loss
    assert relative_error(found, expected) <= SAME_FP32


def test_the_weight_is_the_base_layers_outside_the_models_forward():
    model = adapted()
    head, seen = model.lm_head, []
    own = dict(model.named_parameters())["lm_head.weight"]
    model.register_forward_hook(lambda model, args, output: seen.append(model.lm_head.weight))
    model(input_ids=TOKENS)
    assert head.weight is own and head.merged is None
    assert torch.equal(seen[0], own), "hooks of others run after ours"
    assert copy.deepcopy(model).lm_head.weight is not own
    merged = dk.merge_dora(model)
    assert type(merged.lm_head) is torch.nn.Linear


def test_an_error_in_forward_closes_the_head():
    model = adapted()
    with pytest.raises(IndexError):
        model(input_ids=TOKENS + VOCAB)
    assert not model.lm_head.is_open


def test_a_forward_that_uses_no_head_is_refused_in_training():
    model = adapted()
    model.forward = lambda input_ids: model.model(input_ids=input_ids)
    with torch.no_grad():
        model(TOKENS)
    with pytest.raises(ValueError, match=r"neither called it nor read its weight.*leave the head out"):
        model(TOKENS)


def test_dropout_on_a_read_head_is_refused():
    model = adapted(lora_dropout=0.1)
    add_fused_lm_head(model, outputs=("log_probs",))
    with pytest.raises(ValueError, match="the head has lora_dropout > 0"):
        model(input_ids=TOKENS, labels=TOKENS, fused_lm_head=True)


def test_a_plain_head_may_be_passed_by():
    model = adapted(target_modules=["q_proj"])
    add_fused_lm_head(model, outputs=("log_probs",))
    gradients(model, fused_lm_head=True)


def test_a_packed_head_is_read_decoded():
    model = llama()
    model.lm_head = linear_4bit(model.lm_head.weight)
    model = adapted(model)
    expected = gradients(model)
    add_fused_lm_head(model, outputs=("log_probs",))
    found = gradients(model, fused_lm_head=True)
    for name, value in expected.items():
        assert relative_error(found[name], value) <= SAME_FP32, name
