"""Attention's queries, keys and values together: a model's step is that of its layers, whatever surrounds it."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import dora_kernels as dk
from dora_kernels.blocks.siblings import shared_inputs
from tests.blocks.test_mlp import FAMILIES, adapted, differences
from tests.blocks.test_mlp import calls as mlp_calls  # noqa: F401 (a fixture)
from tests.support.marks import slow
from tests.support.peft_models import peft_model, step
from tests.support.sibling_parents import calls  # noqa: F401 (a fixture)
from tests.support.tiny_models import checkpoint_activations
from tests.tolerances import SAME_FP32

# ruff: noqa: F811 (the fixtures' names)


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_a_step_is_that_of_the_layers(family, space, calls):
    found = step(adapted(family, space=space))
    assert calls == [3, 3]
    expected = step(adapted(family, space=space, fuse_blocks=False))
    assert calls == [3, 3]
    assert max(differences(found, expected).values()) <= 1e-11


def test_some_of_them_adapted(calls):
    options = {"target_modules": ["q_proj", "v_proj"]}
    found, expected = (step(adapted(fuse_blocks=blocks, **options)) for blocks in ("auto", False))
    assert calls == [2, 2]
    assert max(differences(found, expected).values()) <= 1e-11


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_of_a_model(use_reentrant, calls):
    model = adapted()
    expected = step(model)
    checkpoint_activations(model, use_reentrant=use_reentrant)
    found = step(model)
    assert calls == [3] * 6
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("space", ["token", slow("weight")])
def test_the_model_compiles_whole(space, calls, mlp_calls, monkeypatch):
    """With its MLP, which is a block, too."""
    monkeypatch.setattr(FAMILIES["llama"], "num_hidden_layers", 1)
    model = adapted(dtype=torch.float32, space=space)
    expected = step(model)
    found = step(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert calls == [3] * 2 and len(mlp_calls) == 2
    assert max(differences({n.removeprefix("_orig_mod."): t for n, t in found.items()}, expected).values()) <= 1e-5


def test_losses_are_those_of_peft(calls):
    def losses(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        tokens = torch.arange(18).reshape(2, 9) * 7 % 61
        for _ in range(3):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    model, patched = peft_model(dtype=torch.float32), peft_model(dtype=torch.float32)
    report = dk.patch_peft(patched)
    assert report.blocks["base_model.model.model.layers.1.self_attn"] is None
    assert list(losses(patched)) == pytest.approx(list(losses(model)), rel=SAME_FP32)
    assert calls == [3] * 6


def test_states_of_peft_that_run_the_layers_alone(calls):
    model = peft_model()
    dk.patch_peft(model)
    tokens = torch.arange(18).reshape(2, 9)
    with model.disable_adapter():
        model(tokens)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    model(tokens)
    assert not calls
    model.set_adapter("default")
    step(model)
    assert calls == [3, 3], "one adapter is active again"
    model.merge_adapter()
    model(tokens)
    assert calls == [3, 3]
    model.unmerge_adapter()
    dk.unpatch_peft(model)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and not hasattr(module, "shared_hooks")


def test_merging_takes_the_hooks_away(calls):
    model = adapted()
    attention = model.model.layers[0].self_attn
    dk.merge_dora(model, keep_base=True)
    assert shared_inputs(attention) is None and not attention._forward_hooks
    assert not attention._forward_hooks_always_called
    dk.unmerge_dora(model)
    step(model)
    assert calls == [3, 3]


def test_explain_says_what_runs_together():
    model = adapted()
    explained = dk.explain(model, tokens=8192)
    assert explained.blocks["model.layers.0.self_attn"] == "q_proj, k_proj and v_proj as one function"
    assert sum("inside model.layers.0.self_attn, " in str(layer) for layer in explained) == 3
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: None)
    reason = "q_proj, k_proj and v_proj run alone: k_proj has hooks"
    assert dk.explain(model, tokens=8192).blocks["model.layers.0.self_attn"] == reason
    assert "eval mode" in dk.explain(model.eval(), tokens=8192).blocks["model.layers.1.self_attn"]


def test_selective_checkpointing_runs_the_layers_alone(calls):
    def policy(context, operation, *args, **options):
        kept = operation in (torch.ops.aten.slice.Tensor, torch.ops.aten.mm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    model, contexts = adapted(space="weight"), partial(create_selective_checkpoint_contexts, policy)
    expected = step(model)
    assert calls == [3, 3]
    checkpoint_activations(model, use_reentrant=False, context_fn=contexts)
    found = step(model)
    assert calls == [3, 3]
    assert max(differences(found, expected).values()) <= 1e-11
