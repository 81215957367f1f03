"""Layers that share an input, computed by the first that is called: every call gets what its layer alone would give."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.layers.test_data_parallel import replica_of
from tests.support.sibling_parents import assert_same, calls, nothing_is_left, outputs_and_gradients, together  # noqa: F401 (a fixture)

# ruff: noqa: F811 (the fixture's name)


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


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_of_the_parent(use_reentrant, calls):
    parent, alone = together()
    found = outputs_and_gradients(parent, lambda parent, x: checkpoint(parent, x, use_reentrant=use_reentrant))
    assert_same(found, outputs_and_gradients(alone))
    assert calls == [3, 3]


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
