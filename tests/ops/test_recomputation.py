"""What activation checkpointing does not do twice: the norm of a layer, and in weight space the backward's merge."""

import copy
import pickle
import weakref
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dora_kernels as dk
from dora_kernels.ops import recomputation, reference

every_space = pytest.mark.parametrize("space", ["token", "weight"])


@pytest.fixture
def operations(monkeypatch):
    """How often each operation ran; of "merge" those that computed the norm, of "merge again" the others."""
    made, merge, weight_norm = Counter(), reference.merge, reference.weight_norm

    def counted_merge(*args, **options):
        made["merge" if options.get("norm_scale") is None else "merge again"] += 1
        return merge(*args, **options)

    def counted_norm(*args, **options):
        made["weight_norm"] += 1
        return weight_norm(*args, **options)

    monkeypatch.setattr(reference, "merge", counted_merge)
    monkeypatch.setattr(reference, "weight_norm", counted_norm)
    return made


def layers(space, count=2, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 24, dtype=dtype) for _ in range(count)))
    dk.apply_dora(model, dk.DoraConfig(r=2, lora_alpha=4, space=space))
    for layer in model:
        nn.init.normal_(layer.lora_B)
    return model.train()


def gradients(model, x, region=lambda function, x: function(x)):
    model.zero_grad()
    x = x.clone().requires_grad_()
    region(model, x).square().sum().backward()
    return [x.grad, *(parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad)]


def recomputed(model, x):
    return checkpoint(model, x, use_reentrant=False)


def same(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("space", "plain", "checkpointed"),
    [
        ("token", {"weight_norm": 2}, {"weight_norm": 2}),
        ("weight", {"merge": 2, "merge again": 2}, {"merge": 2, "merge again": 2}),
    ],
)
def test_a_checkpoint_costs_no_norm_and_one_merge_a_layer(space, plain, checkpointed, operations):
    """Weight space: one merge in the recomputation, whose W' the backward takes; without that there would be two."""
    model, x = layers(space), torch.randn(5, 24)
    operations.clear()
    expected = gradients(model, x)
    assert operations == plain
    operations.clear()
    found = gradients(model, x, recomputed)
    assert operations == checkpointed
    assert same(found, expected)


@every_space
def test_reentrant_checkpoints_compute_all_again(space, operations):
    model, x = layers(space), torch.randn(5, 24)
    expected = gradients(model, x)
    operations.clear()
    found = gradients(model, x, lambda model, x: checkpoint(model, x, use_reentrant=True))
    assert operations == ({"weight_norm": 4} if space == "token" else {"merge": 4, "merge again": 2})
    assert same(found, expected)


def test_a_region_holds_so_many_bytes_at_most(monkeypatch, operations):
    model, x = layers("weight", count=3), torch.randn(5, 24)
    expected = gradients(model, x)
    monkeypatch.setattr(recomputation, "MOST_KEPT", 2 * 24 * 24 * 4)
    operations.clear()
    found = gradients(model, x, recomputed)
    assert operations == {"merge": 3, "merge again": 3 + 1}, "the third layer's backward merges again"
    assert same(found, expected)


def test_the_forward_holds_no_merged_weight(monkeypatch):
    """What the first pass saves is dropped: of W' nothing lives until the recomputation."""
    merged, original = [], reference.merge

    def watched(*args, **options):
        found = original(*args, **options)
        merged.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(reference, "merge", watched)
    y = recomputed(layers("weight"), torch.randn(5, 24, requires_grad=True))
    assert [reference() for reference in merged] == [None, None]
    y.sum().backward()
    assert [reference() for reference in merged] == [None] * 4


@every_space
def test_the_norm_is_that_of_the_last_forward(space, operations):
    """Two steps with an update in between: the second recomputation takes the second forward's norm."""
    model, plain, x = layers(space), layers(space), torch.randn(5, 24)
    for _ in range(2):
        found, expected = gradients(model, x, recomputed), gradients(plain, x)
        assert same(found, expected)
        with torch.no_grad():
            for each in (model, plain):
                for parameter in each.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.1 * parameter.grad)


@every_space
def test_factors_exchanged_after_the_forward_are_seen(space):
    """As a recomputation with other factors sees them today: by their identity."""
    model, x = layers(space, count=1), torch.randn(5, 24, requires_grad=True)
    y = recomputed(model, x)
    model[0].magnitude = nn.Parameter(2 * model[0].magnitude.detach())
    y.sum().backward()
    other = layers(space, count=1)
    other[0].magnitude = nn.Parameter(2 * other[0].magnitude.detach())
    twin = x.detach().clone().requires_grad_()
    other(twin).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_remember_nothing(copied):
    model = layers("token")
    recomputed(model, torch.randn(5, 24))
    assert model[0].output_use.last_norm is not None
    assert copied(model)[0].output_use.last_norm is None


def _keeps_products(context, operation, *args, **options):
    kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.mul.Tensor)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("space", "case"),
    [("token", "plain"), ("token", "bias"), ("token", "dropout"), ("weight", "plain"), ("weight", "bias")],
)
def test_selective_checkpointing_finds_what_it_kept(space, case, dtype, impl):
    """The kept products are not written over, and the recomputation runs the operations of the forward."""
    model, x = layers(space, dtype=dtype), torch.randn(5, 24, dtype=dtype)
    for layer in model:
        layer.impl = impl
        if case == "plain":
            layer.bias = None
        if case == "dropout":
            layer.lora_dropout, layer.dropout_mode = 0.5, "peft"
    contexts = partial(create_selective_checkpoint_contexts, _keeps_products)
    torch.manual_seed(1)
    found = gradients(model, x, partial(checkpoint, use_reentrant=False, context_fn=contexts))
    torch.manual_seed(1)
    assert same(found, gradients(model, x))
