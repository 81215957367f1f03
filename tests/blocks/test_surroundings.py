"""What surrounds a gated MLP, its class and its checkpointing, may make its layers run alone."""

from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import dora_kernels as dk
from dora_kernels.blocks.fuse import fused_blocks
from tests.blocks.test_mlp import adapted, base, calls, differences  # noqa: F401 (a fixture)
from tests.support.peft_models import peft_model, step
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
