"""What surrounds a gated MLP, its class and its checkpointing, may make its layers run alone."""

import copy
import pickle
from functools import partial

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import dora_kernels as dk
from dora_kernels.blocks.fuse import fused_blocks, unfuse_blocks
from tests.blocks.test_mlp import adapted, base, calls, differences, quantized  # noqa: F401 (a fixture)
from tests.support.peft_models import dora_config, peft_model, step
from tests.support.tiny_models import checkpoint_activations


def test_a_class_with_another_forward(calls, monkeypatch):  # noqa: F811
    """What a library puts on the class counts, in models that are fused before it and after it."""
    before, mlp = adapted(), type(base().model.layers[0].mlp)
    own = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: 2 * own(self, x))
    found = step(before), step(adapted())
    assert not calls
    expected = step(adapted(fuse_blocks=False))
    assert max(*differences(found[0], expected).values(), *differences(found[1], expected).values()) <= 1e-11
    assert dk.explain(before, 8).blocks["model.layers.0.mlp"] == "its layers run alone: its class got another forward"


def test_selective_checkpointing_runs_the_layers_alone(calls):  # noqa: F811
    """It keeps views too, where a policy asks for them: none may be of memory that is filled later."""

    def policy(context, operation, *args, **options):
        kept = operation in (torch.ops.aten.slice.Tensor, torch.ops.aten.mm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    model, contexts = adapted(space="weight"), partial(create_selective_checkpoint_contexts, policy)
    expected = step(model)
    assert len(calls) == 2
    checkpoint_activations(model, use_reentrant=False, context_fn=contexts)
    found = step(model)
    assert len(calls) == 2
    assert max(differences(found, expected).values()) <= 1e-11


def test_the_config_counts_in_a_model_that_peft_unloaded():
    model = peft_model()
    dk.patch_peft(model)
    plain = model.unload()
    dk.apply_dora(plain, dk.DoraConfig(r=4, fuse_blocks=False))
    assert not fused_blocks(plain)


@pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
def test_peft_gives_the_class_back_when_it_unloads(unload):
    model = peft_model()
    dk.patch_peft(model)
    assert fused_blocks(model)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    plain = getattr(model, unload)()
    assert type(plain.model.layers[0].mlp) is type(base().model.layers[0].mlp)
    assert not hasattr(plain.model.layers[0].mlp, "dora_block")
    assert hooks_of(plain) == [] and len(hooks_of(copied)) == 6
    # A copy's hooks are its own.
    assert hooks_of(getattr(copied, unload)()) == []
    # The file of the plain model needs no engine to be read.
    assert b"dora_kernels" not in pickle.dumps(plain)


def from_a_file(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("copied", [copy.deepcopy, from_a_file])
def test_a_layer_is_copied_without_the_module_around_it(copied):
    """Again and again: the handles of hooks that are gone stay behind."""
    model = peft_model()
    dk.patch_peft(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert len(layer.shared_hooks) == 2
    again = copied(copied(layer))
    assert isinstance(again, dk.peft.layer.FusedLinear) and again.shared_hooks == ()


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ] + [key for module in model.modules() for key in module._forward_hooks_always_called]


def test_an_activation_whose_class_got_another_forward(calls, monkeypatch):  # noqa: F811
    model, expected = adapted(), adapted(fuse_blocks=False)
    kind = type(model.model.layers[0].mlp.act_fn)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * own(self, x))
    found = step(model)
    assert not calls and max(differences(found, step(expected)).values()) <= 1e-11
    reason = "its layers run alone: the class of a module in it got another forward"
    assert dk.explain(model, 8).blocks["model.layers.0.mlp"] == reason


def test_a_class_that_was_made_over_the_fused_one():
    """As `fully_shard` makes it."""
    model = adapted()
    fused, plain = [layer.mlp for layer in model.model.layers], type(base().model.layers[0].mlp)
    over = type(f"FSDP{type(fused[0]).__name__}", (_Sharded, type(fused[0])), {"limit": 3})
    for mlp in fused:
        mlp.__class__ = over
    unfuse_blocks(model)
    assert type(fused[0]) is type(fused[1]) and type(fused[0]).__bases__ == (_Sharded, plain)
    assert type(fused[0]).__name__ == f"FSDP{plain.__name__}" and fused[0].limit == 3 and not fused_blocks(model)


class _Sharded:
    pass


def _hook(model):
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)


def _replace_forward(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = layer.forward


def _another_activation(model):
    model.model.layers[0].mlp.act_fn = nn.ReLU()


def _hooked_activation(model):
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)


def _frozen_factor(model):
    model.model.layers[0].mlp.down_proj.lora_A.requires_grad_(False)


def _a_plain_layer(model):
    mlp = model.model.layers[0].mlp
    mlp.gate_proj = nn.Linear(32, 48, bias=False, dtype=torch.float64).requires_grad_(False)


def _another_space(model):
    model.model.layers[0].mlp.gate_proj.space = "weight"


def _other_rank(model):
    mlp = model.model.layers[0].mlp
    mlp.gate_proj = dk.DoraLinear(mlp.gate_proj.weight, r=3, lora_alpha=8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "up_proj has hooks"),
        (_replace_forward, "up_proj had its forward replaced"),
        (_another_activation, "act_fn is another than it was"),
        (_hooked_activation, "act_fn is another than it was"),
        (_frozen_factor, "a factor does not train"),
        (_a_plain_layer, "gate_proj is no DoRA layer"),
        (_another_space, "its layers differ in the space or the implementation that they ask for"),
        (_other_rank, "gate and up differ in their features or their rank"),
    ],
)
def test_what_makes_the_layers_run_alone(change, reason, calls):  # noqa: F811
    """The other MLP stays one function; the result is that of a model whose layers all run alone."""
    model, alone = adapted(), adapted(fuse_blocks=False)
    for each in (model, alone):
        torch.manual_seed(2)
        change(each)
    found = step(model)
    assert len(calls) == 1
    assert dk.explain(model, 8).blocks["model.layers.0.mlp"] == f"its layers run alone: {reason}"
    assert dk.explain(model, 8).blocks["model.layers.1.mlp"] == "one function (silu)"
    assert max(differences(found, step(alone)).values()) <= 1e-11


def test_a_hook_of_all_modules_sees_the_layers(calls):  # noqa: F811
    model, seen = adapted(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        step(model)
    finally:
        handle.remove()
    assert model.model.layers[0].mlp.gate_proj in seen and not calls


@pytest.mark.parametrize("engine", ["ours", "peft"])
def test_a_quantised_mlp_answers_in_the_dtype_of_its_layers(engine, calls):  # noqa: F811
    """Under autocast that is autocast's in our layers, and in PEFT's that of the input."""

    def output(blocks):
        torch.manual_seed(1)
        model = quantized(base("nf4", torch.float32))
        if engine == "ours":
            dk.apply_dora(model, dk.DoraConfig(r=4, fuse_blocks=blocks))
        else:
            dk.patch_peft(peft.get_peft_model(model, dora_config()), blocks=blocks)
        with torch.autocast("cpu", torch.bfloat16):
            return model.train().model.layers[0].mlp(torch.ones(1, 3, 64))

    found, expected = output("auto"), output(False)
    assert len(calls) == 1
    assert found.dtype == expected.dtype == (torch.bfloat16 if engine == "ours" else torch.float32)
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()  # some roundings to 8 bits each
