"""Inside `accumulating(model, keep_weights=True)` W' outlives a call, and no graph loses the one that it will read."""

import copy
import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_kernels as dk
from dora_kernels.ops import reference
from dora_kernels.ops.kept_weight import KeptWeight
from tests.layers.test_accumulating import SIZE, TOKENS, assert_same, gradients, ours
from tests.support.tiny_models import llama


@pytest.fixture
def merges(monkeypatch):
    """How often W' was merged."""
    made, merge = Counter(), reference.merge

    def counted(*args, **options):
        made["merged"] += 1
        return merge(*args, **options)

    for room in (reference, sys.modules["dora_kernels.ops.reference.kept_merge"]):
        monkeypatch.setattr(room, "merge", counted)
    return made


def in_weight_space(**options):
    return ours(space="weight", impl="reference", **options)


def recomputed(function):
    return lambda x: checkpoint(function, x, use_reentrant=False)


@pytest.mark.parametrize("wrapped", [lambda function: function, recomputed], ids=["plain", "checkpointed"])
def test_weights_are_merged_once_a_step(merges, wrapped):
    model, _, lora_B, *_ = in_weight_space()
    x = torch.randn(5, SIZE, requires_grad=True)

    def step():
        wrapped(model)(x).square().sum().backward()
        return merges["merged"]

    with dk.accumulating(model, keep_weights=True):
        assert [step() for _ in range(3)] == [2, 2, 2]
        memory = model[0].output_use.kept_weight.merged.data_ptr()
        with torch.no_grad():
            lora_B.add_(0.1)
        assert [step() for _ in range(2)] == [3, 3]
        assert model[0].output_use.kept_weight.merged.data_ptr() == memory, "in its place"


@pytest.mark.parametrize("way", ["seen", "unseen"])
def test_a_graph_keeps_the_weight_that_it_was_made_with(way):
    """Two forwards, with a change in between that autograd sees or not, then both backwards."""
    model, _, lora_B, *_ = in_weight_space()
    twin, x = copy.deepcopy(model), torch.randn(5, SIZE)
    found = []
    for m, B in ((model, lora_B), (twin, twin[0].lora_B)):
        with dk.accumulating(m, keep_weights=m is model):
            first = x.clone().requires_grad_()
            before = m(first)
            grad_before = None
            if m is twin:  # before the change, which nothing saved survives here
                (grad_before,) = torch.autograd.grad(before.square().sum(), first)
            with torch.no_grad():
                (B if way == "seen" else B.data).mul_(3.0)
            second = x.clone().requires_grad_()
            after = m(second)
            (grad_after,) = torch.autograd.grad(after.square().sum(), second)
            if m is model and way == "unseen":
                (grad_before,) = torch.autograd.grad(before.square().sum(), first)
            found.append((before, after, grad_after, grad_before))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])
    if way == "unseen":
        assert torch.equal(found[0][3], found[1][3])


def test_a_rewrite_under_an_older_graph_raises(monkeypatch):
    """Should one happen in spite of all: saved tensors count it."""
    monkeypatch.setattr(KeptWeight, "is_held", False)
    model, _, lora_B, *_ = ours(space="weight", impl="triton")
    x = torch.randn(5, SIZE, requires_grad=True)
    with dk.accumulating(model, keep_weights=True):
        older = model(x)
        lora_B.data.mul_(3.0)
        model(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            older.sum().backward()


def test_a_graph_that_is_retained_holds_it():
    model, _, lora_B, *_ = in_weight_space()
    x = torch.randn(5, SIZE, requires_grad=True)
    with dk.accumulating(model, keep_weights=True):
        y = model(x)
        (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        lora_B.data.mul_(3.0)
        model(x)
        (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second)


def test_offloading_leaves_it_where_it_is():
    """Hooks that copy what is saved, as those of activation offloading, would copy W' at each call."""
    model = in_weight_space()[0]
    twin, x, packed = copy.deepcopy(model), torch.randn(5, SIZE, requires_grad=True), []

    def pack(tensor):
        packed.append(tensor.data_ptr())
        return tensor.clone()

    with dk.accumulating(model, keep_weights=True):
        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                found = gradients(model, x)
            assert_same(found, gradients(twin, x))
        kept = [layer.output_use.kept_weight.merged.data_ptr() for layer in model]
    assert packed and not {*kept} & {*packed}


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_calls_that_keep_none_leave_none_stale(impl):
    """In token space: what a call found to differ, the next one finds equal, and W' is of neither."""
    model = ours(space="weight", impl=impl)[0]
    twin, x = copy.deepcopy(model), torch.randn(5, SIZE)
    with dk.accumulating(model, keep_weights=True):
        gradients(model, x)
        for space in ("token", "weight", "token", "token", "weight", "weight"):
            for m in (model, twin):
                m[0].space = m[1].space = space
                if space == "token":
                    with torch.no_grad():
                        m[0].lora_B.mul_(1.5)
            assert_same(gradients(model, x), gradients(twin, x))


def test_under_autocast_and_without():
    model = in_weight_space()[0]
    twin, x = copy.deepcopy(model), torch.randn(5, SIZE)
    with dk.accumulating(model, keep_weights=True):
        for enabled in (False, True, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                assert_same(gradients(model, x), gradients(twin, x))


@pytest.mark.parametrize("rounding", ["nearest", "dithered"])
def test_another_rounding(rounding):
    model = in_weight_space()[0].bfloat16()
    twin, x = copy.deepcopy(model), torch.randn(5, SIZE, dtype=torch.bfloat16)
    with dk.accumulating(model, keep_weights=True):
        gradients(model, x)
        for m in (model, twin):
            m[0].rounding, m[1].salt = rounding, 99
        assert_same(gradients(model, x), gradients(twin, x))


@pytest.mark.parametrize("forward_in_scope", [False, True])
def test_a_recomputation_in_another_scope_than_its_forward(forward_in_scope):
    model, *_ = in_weight_space()
    x = torch.randn(5, SIZE, requires_grad=True)

    def passes(*scopes):
        with scopes[0]:
            y = recomputed(model)(x)
        with scopes[1]:
            y.square().sum().backward()
            model(x).square().sum().backward()
        return gradients(model, x)

    def scope(is_open=True):
        return dk.accumulating(model, keep_weights=True) if is_open else nullcontext()

    assert_same(passes(scope(forward_in_scope), scope()), passes(nullcontext(), nullcontext()))


def test_blocks_keep_one_weight_for_their_layers(merges):
    """q, k and v share memory, gate and up too; a layer that is called alone in between has its own."""
    config = dk.DoraConfig(r=2, space="weight", impl="reference")
    model = dk.apply_dora(llama(layers=1), config).train()
    twin = copy.deepcopy(model)

    def step(m):
        m.zero_grad()
        m(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return [p.grad.clone() for p in m.parameters() if p.requires_grad]

    layer = model.model.layers[0]
    with dk.accumulating(model, keep_weights=True):
        merges.clear()
        step(model)
        assert merges["merged"] == 7
        shapes = [module.output_use.kept_weight for module in model.modules() if hasattr(module, "output_use")]
        assert sum(kept is not None for kept in shapes) == 4
        step(model)
        assert merges["merged"] == 7
        with torch.no_grad():
            for m in (model, twin):
                m.model.layers[0].self_attn.k_proj.lora_B.add_(1.0)
        assert_same(step(model), step(twin))
        before = merges["merged"]
        layer.self_attn.q_proj(torch.randn(3, layer.self_attn.q_proj.in_features)).sum().backward()
        with torch.no_grad():
            for m in (model, twin):
                m.model.layers[0].self_attn.q_proj.lora_B.add_(1.0)
        assert merges["merged"] == before + 1
        assert_same(step(model), step(twin))


def test_a_norm_that_was_kept_anew():
    """In token space, of factors in another dtype: none was compared since, and yet W' is another one."""
    model, x = in_weight_space()[0], torch.randn(5, SIZE, dtype=torch.bfloat16)
    for layer in model:
        layer.weight.data = layer.weight.data.bfloat16()
    model[0].bias.data = model[0].bias.data.bfloat16()
    twin = copy.deepcopy(model)
    with dk.accumulating(model, keep_weights=True):
        gradients(model, x)
        for m in (model, twin):
            for parameter in (m[0].lora_A, m[0].lora_B, m[0].magnitude):
                parameter.data = (2 * parameter.data).bfloat16()
            m[0].space = "token"
        gradients(model, x)
        for m in (model, twin):
            m[0].space = "weight"
        assert_same(gradients(model, x), gradients(twin, x))


def convolution():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3))
    return model, torch.randn(2, 3, 6, 6)


def embedding():
    return nn.Sequential(nn.Embedding(20, SIZE), nn.Linear(SIZE, SIZE)), torch.arange(6)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("make", [convolution, embedding])
def test_convolutions_and_embeddings(make, impl):
    torch.manual_seed(0)
    model, x = make()
    dk.apply_dora(model, dk.DoraConfig(r=2, target_modules=["0", "1"], impl=impl)).train()
    for layer in model:
        nn.init.normal_(layer.lora_B, std=0.1)
    twin = copy.deepcopy(model)
    with dk.accumulating(model, keep_weights=True):
        for _ in range(2):
            for _ in range(3):
                assert_same(gradients(model, x), gradients(twin, x))
            for m in (model, twin):
                m[0].lora_B.data.add_(0.1)
        assert model[0].output_use.kept_norm.comparisons == 5
        assert (model[0].output_use.kept_weight is None) == (make is embedding)


def test_explain_says_what_is_kept():
    model = in_weight_space()[0]
    model[1].space = "token"
    with dk.accumulating(model, keep_weights=True):
        first, second = (explanation.plan.reason for explanation in dk.explain(model, tokens=4))
    assert first.endswith("accumulating keeps the norm and merged weight")
    assert second.endswith("accumulating keeps the norm")
    assert "accumulating" not in str(dk.explain(model, tokens=4))


def test_memory_goes_with_the_scope():
    model = in_weight_space()[0]
    with dk.accumulating(model, keep_weights=True):
        gradients(model, torch.randn(5, SIZE))
        assert all(layer.output_use.kept_weight is not None for layer in model)
        twin = copy.deepcopy(model)
        assert not any(layer.output_use.kept_weight for layer in twin)
    assert not any(layer.output_use.kept_weight or layer.output_use.keeps_weight for layer in model)


def test_only_where_asked_for():
    model = in_weight_space()[0]
    with dk.accumulating(model):
        gradients(model, torch.randn(5, SIZE))
        assert not any(layer.output_use.kept_weight for layer in model)


def test_merge_aware_layers_keep_nothing():
    """Their n is summed in another way."""
    model = in_weight_space(merge_aware=True)[0]
    twin, x = copy.deepcopy(model), torch.randn(5, SIZE)
    with dk.accumulating(model, keep_weights=True):
        for _ in range(2):
            assert_same(gradients(model, x), gradients(twin, x))
        assert not any(layer.output_use.kept_norm or layer.output_use.kept_weight for layer in model)
        assert all("accumulating keeps nothing of it" in each.plan.reason for each in dk.explain(model, tokens=4))
