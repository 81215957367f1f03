"""Layers that share an input, computed by the first that is called: every call gets what its layer alone would give."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_kernels as dk
from dora_kernels.blocks import siblings as room
from dora_kernels.blocks.siblings import share_inputs
from tests.layers.test_data_parallel import replica_of

NAMES = ("q", "k", "v")


@pytest.fixture
def calls(monkeypatch):
    """The number of layers in each call of `dora_siblings`."""
    made, original = [], room.dora_siblings

    def counted(x, members, **options):
        made.append(len(members))
        return original(x, members, **options)

    monkeypatch.setattr(room, "dora_siblings", counted)
    return made


class Parent(nn.Module):
    """Calls its layers as `order` says, and does `between` to the input after the first."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        for name, features in zip(NAMES, (12, 4, 8)):
            linear = nn.Linear(6, features, bias=name == "v", dtype=dtype)
            layer = dk.DoraLinear.from_linear(linear, r=3, lora_alpha=6, salt=features)
            nn.init.normal_(layer.lora_B, std=0.1)
            setattr(self, name, layer)
        self.order, self.between, self.after = NAMES, lambda x: x, lambda y: y

    def forward(self, x):
        found = []
        for name in self.order:
            found.append(self.after(getattr(self, name)(x)))
            if len(found) == 1:
                x = self.between(x)
        return tuple(found)


def together(order=NAMES, between=lambda x: x, after=lambda y: y, **options):
    """A parent whose layers share an input, and its twin, whose layers run alone."""
    pair = Parent(**options), Parent(**options)
    for parent in pair:
        parent.order, parent.between, parent.after = order, between, after
    share_inputs(pair[0], (NAMES,))
    return pair


def outputs_and_gradients(parent, run=lambda parent, x: parent(x)):
    parent.zero_grad()
    leaf = torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    ys = run(parent, leaf * 1.0)
    sum((y * torch.arange(1, y.numel() + 1).view_as(y)).sum() for y in ys if y.requires_grad).backward()
    gradients = {name: p.grad for name, p in parent.named_parameters() if p.requires_grad}
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"x": leaf.grad} | gradients


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        assert value is None or torch.allclose(found[name], value, rtol=1e-11, atol=1e-11), name


def nothing_is_left(parent):
    return all(getattr(parent, name).shared_call is None for name in NAMES)


def _no_grad_for_one(parent, x):
    with torch.no_grad():
        first = parent.q(x)
    return [first, parent.k(x), parent.v(x)]


STATES = {
    "in-order": {},
    "last-first": {"order": ("v", "q", "k")},
    "some-never": {"order": ("k", "v")},
    "one-alone": {"order": ("k",)},
    "one-twice": {"order": ("q", "k", "v", "k")},
    "first-twice": {"order": ("q", "q", "k", "v")},
    "another-input": {"between": lambda x: x * 2},
    "an-equal-input": {"between": lambda x: x.clone()},
    "written-outputs": {"after": lambda y: y.mul_(2)},
    "written-outputs-of-one-twice": {"after": lambda y: y.mul_(2), "order": ("q", "k", "v", "k")},
}


@pytest.mark.parametrize("name", STATES)
def test_each_call_gets_what_its_layer_gives(name, calls):
    parent, alone = together(**STATES[name])
    assert_same(outputs_and_gradients(parent), outputs_and_gradients(alone))
    assert calls == [3] and nothing_is_left(parent)


@pytest.mark.parametrize("between", [lambda x: x.mul_(2), lambda x: (x[:2].zero_(), x)[1]], ids=["whole", "view"])
def test_an_input_that_is_written_over(between, calls):
    """Without gradients, as in the first forward of reentrant checkpointing: no backward may need the input."""
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        found, expected = (parent(x.clone()) for parent in together(between=between))
    assert all(map(torch.allclose, found, expected)) and not torch.equal(found[1], together()[1](x)[1])
    assert calls == [3]


def test_a_second_input_is_computed_alone(calls):
    """Not the group again: its other outputs might never be asked for."""
    parent, _ = together(order=("q", "k", "v", "k", "v"), between=lambda x: x * 2)
    outputs_and_gradients(parent)
    assert calls == [3]


@pytest.mark.parametrize("name", ["grad-mode", "autocast", "checkpoint"])
def test_modes_that_change_between_the_calls(name, calls):
    def forward(self, x):
        first = self.k(x)
        if name == "grad-mode":
            with torch.no_grad():
                return [first, self.q(x), self.v(x)]
        if name == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return [first, self.q(x).double(), self.v(x).double()]
        return [first, checkpoint(self.q, x, use_reentrant=False), self.v(x)]

    found = []
    for parent in together(dtype=torch.float32 if name == "autocast" else torch.float64):
        parent.forward = forward.__get__(parent)

        def run(parent, x):
            return parent(x.float() if name == "autocast" else x)

        found.append(outputs_and_gradients(parent, run))
    if name == "autocast":
        assert all(torch.allclose(found[0][key], found[1][key], rtol=1e-5, atol=1e-5) for key in found[1])
    else:
        assert_same(*found)
    assert calls == [3]


def test_a_checkpoint_that_holds_one_layer(calls):
    """Its recomputation calls that layer alone: so does its forward."""

    def forward(self, x):
        return [checkpoint(self.q, x, use_reentrant=False), self.k(x), self.v(x)]

    pair = together()
    for parent in pair:
        parent.forward = forward.__get__(parent)
    assert_same(*map(outputs_and_gradients, pair))
    assert not calls


def test_a_parent_that_raises_leaves_nothing(calls):
    def stop(x):
        raise KeyError

    parent, _ = together(between=stop)
    with pytest.raises(KeyError):
        parent(torch.zeros(5, 6, dtype=torch.float64))
    assert calls == [3] and nothing_is_left(parent)


def test_nothing_outlives_the_parents_forward(calls):
    parent, _ = together(order=("q",))
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        parent(x)
    seen = weakref.ref(x)
    del x
    gc.collect()
    assert calls == [3] and seen() is None


def test_a_layer_that_is_called_outside_runs_alone(calls):
    parent, _ = together()
    parent.q(torch.randn(5, 6, dtype=torch.float64))
    assert not calls


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_of_the_parent(use_reentrant, calls):
    parent, alone = together()
    found = outputs_and_gradients(parent, lambda parent, x: checkpoint(parent, x, use_reentrant=use_reentrant))
    assert_same(found, outputs_and_gradients(alone))
    assert calls == [3, 3]


def test_inference_runs_the_layers_alone(calls):
    parent, alone = (each.eval() for each in together())
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        assert all(map(torch.equal, parent(x), alone(x)))
    assert not calls
    parent(x)
    assert calls == [3], "with gradients"
    with torch.inference_mode():
        parent.train()(x)
    assert calls == [3]


def _hook(parent):
    parent.k.register_forward_hook(lambda *_: None)


def _dropout(parent):
    parent.k.lora_dropout = 1e-9


def _frozen(parent):
    parent.v.lora_A.requires_grad_(False)


def _another_form(parent):
    parent.k.space = "token"


def _compiled(parent):
    parent.v._compiled_call_impl = parent.v._call_impl


def _plain(parent):
    parent.k = nn.Linear(6, 4, bias=False, dtype=torch.float64).requires_grad_(False)


def _written(parent):
    parent.k.output_use.is_written = True


def _wrapped(parent):
    """As a wrapper that answers for the layer inside."""

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    parent.k = Wrapper(parent.k)


@pytest.mark.parametrize(
    "change", [_hook, _dropout, _frozen, _another_form, _compiled, _plain, _written, _wrapped]
)  # fmt: skip
def test_what_makes_the_layers_run_alone(change, calls):
    pair = together()
    for parent in pair:
        torch.manual_seed(1)
        change(parent)
    assert_same(*map(outputs_and_gradients, pair))
    assert not calls


def test_a_model_that_writes_over_an_output_is_found_out(calls):
    parent, alone = together(after=lambda y: y.mul_(2))
    expected = outputs_and_gradients(alone)
    assert_same(outputs_and_gradients(parent), expected)
    assert_same(outputs_and_gradients(parent), expected)
    assert calls == [3], "from the second step on each layer gives away a copy"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_compute_with_their_own_layers(copied, calls):
    parent, _ = together()
    parent.between = parent.after = torch.positive  # pickle takes no lambda
    parent.order = ("q", "v")
    twin, x = copied(parent), torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in parent.parameters():
            parameter.zero_()
    twin.between = lambda x: x
    assert all(y.abs().sum() > 0 for y in twin(x))
    assert calls == [3]
    assert copy.deepcopy(parent.q).state_dict().keys() == parent.q.state_dict().keys()


def test_replicas_of_data_parallel(calls):
    parent, alone = together()
    assert_same(outputs_and_gradients(replica_of(parent)), outputs_and_gradients(replica_of(alone)))
    assert_same(outputs_and_gradients(parent), outputs_and_gradients(alone))
    assert calls == [3, 3] and nothing_is_left(parent)
