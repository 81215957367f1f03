"""What an adapted model watches while it trains, and that merging takes the watch away."""

import warnings

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import dora_kernels as dk
from tests.support.tiny_models import VOCAB, checkpoint_activations, llama

TOKENS = torch.arange(14).reshape(2, 7) * 11 % VOCAB


def hooks_of(model):
    return [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def adapted(**options):
    return dk.apply_dora(llama(), dk.DoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"]} | options)).train()


def step(model, optimizer):
    optimizer.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def pass_by(layer):
    """As a model that multiplies by the layer's weight itself."""
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight)


def test_idle_adapters_are_named_at_the_first_step_and_not_again():
    model = adapted()
    pass_by(model.model.layers[1].self_attn.q_proj)
    optimizer = optimizer_of(model)
    with pytest.warns(UserWarning, match=r"1 of 4 DoRA layers got no gradient.*model.layers.1.self_attn.q_proj"):
        step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(model, optimizer)


def test_a_step_of_another_model_says_nothing_and_does_not_end_the_watch():
    model, other = adapted(), torch.nn.Linear(2, 2)
    pass_by(model.model.layers[0].self_attn.v_proj)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        other(torch.ones(1, 2)).sum().backward()
        optimizer_of(other).step()
    with pytest.warns(UserWarning, match="1 of 4 DoRA layers got no gradient"):
        step(model, optimizer_of(model))


def test_a_step_in_which_all_train_says_nothing():
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(model, optimizer_of(model))


def test_two_adapted_models_are_watched_beside_each_other():
    models = [adapted(), adapted()]
    for model in models:
        pass_by(model.model.layers[1].self_attn.q_proj)
    for model in models:
        with pytest.warns(UserWarning, match="1 of 4 DoRA layers got no gradient"):
            step(model, optimizer_of(model))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
def test_checkpointing_reaches_a_vision_tower(use_reentrant):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    pixels = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = dk.apply_dora(ViTForImageClassification(config), dk.DoraConfig(r=2, target_modules=["q_proj"])).train()
        if checkpointed:
            checkpoint_activations(model, use_reentrant=use_reentrant)
        model(pixels).logits.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 6
    assert all(map(torch.equal, *gradients))
    assert pixels.grad is None and not pixels.requires_grad


def test_merging_takes_the_hooks_away_and_unmerging_puts_them_back():
    model = adapted(target_modules=["q_proj", "lm_head"])
    before = hooks_of(model)
    assert before
    dk.merge_dora(model, keep_base=True)
    assert not hooks_of(model)
    dk.unmerge_dora(model)
    assert len(hooks_of(model)) == len(before)
