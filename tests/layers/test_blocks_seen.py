"""Blocks are looked for in all modules: layers that share an input, the innermost of nested ones, those that repeat."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dora_kernels as dk
from dora_kernels.layers import probe as room
from dora_kernels.layers.blocks_seen import Siblings
from dora_kernels.layers.gated_mlp_seen import GatedMlp
from dora_kernels.layers.probe import probe
from tests.support.families import tiny
from tests.support.one_block import D, Host, mlp, module

SILU = GatedMlp("gate", "up", "down", "silu")


@pytest.fixture(autouse=True)
def _nothing_seen_before(monkeypatch):
    monkeypatch.setattr(room, "SEEN", {})


def attention(forward, **parts):
    return module(forward, **{"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), **parts})


def attends(self, x):
    q, k, v = self.q(x), self.k(x), self.v(x)
    return self.o((q @ k.mT).softmax(-1) @ v)


def attends_by_a_gate(self, x):
    q, k, v, gate = self.q(x), self.k(x), self.v(x), self.gate(x)
    return self.o((q @ k.mT).softmax(-1) @ v * gate.sigmoid())


def of_two_inputs(self, x):
    y = x + 1
    return (self.q(x) + self.o(y)) @ (self.k(x) + self.v(y)).mT


def in_an_order(self, x):
    return self.v(x) + self.o(x.clone()) + self.q(x)


def twice_in_training(self, x):
    return self.q(x) + self.k(x) + (self.v(x) if self.training else self.v(self.v(x)))


GROUPS = {
    "three": (attention(attends), [("q", "k", "v")]),
    "with_a_gate": (attention(attends_by_a_gate, gate=(D, D)), [("q", "k", "v", "gate")]),
    "two_and_two": (attention(of_two_inputs), [("q", "k"), ("o", "v")]),
    "in_the_order_of_their_calls": (attention(in_an_order), [("v", "q")]),
    "of_an_mlp_that_is_none": (mlp(lambda self, x: self.down(self.gate(x) * self.up(x))), [("gate", "up")]),
}


@pytest.mark.parametrize("name", GROUPS)
def test_siblings(name):
    block, expected = GROUPS[name]
    seen = probe(Host(block))
    assert seen[2:] == (None, {}, {"block": tuple(Siblings(layers) for layers in expected)}, {})


def writes_between(self, x):
    q, k = self.q(x), self.k(x)
    x.add_(1)
    return q + k + self.v(x)


def writes_twice(self, x):
    q = self.q(x)
    x.add_(1)
    k = self.k(x)
    x.add_(1)
    return q + k + self.v(x)


def writes_key(self, x):
    q, k, v = self.q(x), self.k(x), self.v(x)
    k.view(-1).clamp_(-1, 1)
    return q + k + v


def calls_again(self, x):
    return self.q(x) + self.k(x) + self.v(self.q(x))


def calls_each_again(self, x):
    return self.q(x) + self.k(x) + self.q(x) + self.k(x)


def copies(self, x):
    return self.q(x) + self.k(x.clone()) + self.v(x + 0)


def copies_in_inference(self, x):
    return self.q(x) + self.k(x if self.training else x.clone())


def calls_by_name(self, x):
    return self.q(x) + self.k(input=x)


def query_without_gradients(self, x):
    with torch.no_grad():
        q = self.q(x)
    return q + self.k(x) + self.v(x)


NO_GROUPS = {
    "written_between": (writes_between, [("q", "k")], "writes over the input of q and k and v between their calls"),
    "written_twice": (writes_twice, [], "writes over the input of q and k and v between their calls"),
    "output_written": (writes_key, [("q", "v")], "has k's output written over"),
    "called_again": (calls_again, [], "calls q more than once"),
    "each_called_again": (calls_each_again, [], "calls q more than once"),
    "copies": (copies, [], None),
    "inference": (copies_in_inference, [], "does not call q and k alike in every call"),
    "twice_in_training": (twice_in_training, [("q", "k")], "calls v more than once"),
    "by_name": (calls_by_name, [], None),
    "gradients": (query_without_gradients, [("k", "v")], "does not call q and k and v alike in every call"),
}


@pytest.mark.parametrize("name", NO_GROUPS)
def test_what_is_almost_a_sibling(name):
    forward, left, reason = NO_GROUPS[name]
    seen = probe(Host(attention(forward)))
    assert seen.stopped is None
    assert seen.siblings == ({"block": tuple(Siblings(layers) for layers in left)} if left else {})
    assert seen.not_blocks.get("block") == reason


def views_across_tokens(self, x):
    return self.q(x).view(-1, D // 2).view(x.shape) + self.k(x)


def test_an_output_that_must_be_contiguous_is_no_column_of_a_wider_tensor():
    seen = probe(Host(attention(views_across_tokens)))
    assert seen.stopped is None and not seen.siblings
    assert seen.not_blocks["block"].startswith("views a layer's output as if its rows were adjacent (")


def test_layers_of_several_modules_are_no_siblings():
    def part():
        return module(lambda self, x: self.only(x), only=(D, D))

    seen = probe(Host(module(lambda self, x: self.one(x) + self.two(x), one=part(), two=part())))
    assert seen[2:] == (None, {}, {}, {})


def fits(self, x, scale=1):
    return self.down(F.silu(self.gate(x)) * self.up(x))


def hands_on(self, x):
    return self.inner(x)


def hands_on_with_a_scale(self, x):
    return self.inner(x, 2)


def test_of_two_modules_that_compute_the_same_the_inner_one_is_the_block():
    assert probe(Host(module(hands_on, inner=mlp(fits)))).mlps == {"block.inner": SILU}


def test_the_outer_one_is_the_block_where_the_inner_one_cannot_be():
    seen = probe(Host(module(hands_on_with_a_scale, inner=mlp(fits))))
    assert seen.mlps == {"block": GatedMlp("inner.gate", "inner.up", "inner.down", "silu")} and not seen.not_blocks


def in_turn(self, x):
    for layer in self.layers:
        x = layer(x)
    return x


def test_blocks_that_repeat_in_lists_of_lists():
    expert = mlp(fits)
    layer = module(lambda self, x: self.experts[0](x) + self.experts[1](x), experts=copies_of(expert))
    seen = probe(Host(module(in_turn, layers=copies_of(layer))))
    assert seen.mlps == {f"block.layers.{i}.experts.{j}": SILU for i in (0, 1) for j in (0, 1)}


def copies_of(part):
    return nn.ModuleList([part, copy.deepcopy(part)])


def test_blocks_that_differ_in_a_function_do_not_repeat():
    layers = copies_of(mlp(lambda self, x: self.down(self.act(self.gate(x)) * self.up(x))))
    layers[0].act, layers[1].act = F.silu, F.relu
    seen = probe(Host(module(in_turn, layers=layers)))
    assert seen.mlps == {"block.layers.0": SILU} and list(seen.not_blocks) == ["block.layers.1"]


def test_layers_alike_in_one_list_are_each_followed():
    parts = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])
    model = Host(module(lambda self, x: self.parts[2](F.silu(self.parts[0](x)) * self.parts[1](x)), parts=parts))
    bare = probe(model)
    assert bare.mlps == {"block": GatedMlp("parts.0", "parts.1", "parts.2", "silu")}
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["0", "1", "2"])
    assert probe(peft.inject_adapter_in_model(config, model)) == bare


def wrap_with_peft(model):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, use_dora=True, target_modules="all-linear")).get_base_model()


def patch(model):
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, use_dora=True, target_modules="all-linear"))
    dk.patch_peft(wrapped)
    return wrapped.get_base_model()


def give_a_subclass(model):
    for layer in model.model.layers:
        layer.mlp.__class__ = type("Subclass", (HandsOn, type(layer.mlp)), {})
    return model


class HandsOn:
    def forward(self, x):
        return super().forward(x)


CHANGES = [lambda model: dk.apply_dora(model, dk.DoraConfig(r=2)), wrap_with_peft, patch, give_a_subclass]


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize("change", CHANGES, ids=["apply_dora", "peft", "patch_peft", "subclass"])
def test_a_changed_model_has_the_same_blocks(kind, change):
    model = tiny(f"decoder {kind}").model
    before = probe(model)
    after = probe(change(model))
    assert after == before and len(after.mlps) == 2


def test_a_model_that_stops_halfway_has_no_blocks():
    def stops(self, x):
        raise RuntimeError(f"after {self.inner(x).shape[1]} tokens")

    seen = probe(Host(module(stops, inner=mlp(fits))))
    assert seen[2:] == ("RuntimeError: after 8 tokens", {}, {}, {})


def again(self, x, times=1):
    return sum(self.q(x) + self.k(x) for _ in range(times))


@pytest.mark.parametrize(
    ("block", "found"),
    [(mlp(fits), {"mlps": {"block": SILU}}), (attention(again), {"siblings": {"block": (Siblings(("q", "k")),)}})],
    ids=["mlp", "siblings"],
)
def test_inputs_that_a_model_does_not_take_count_for_nothing(block, found):
    class Takes(Host):
        def forward(self, input_ids, bbox=None):
            if bbox is None:
                raise RuntimeError(self.block(self.embed(input_ids), 2))
            return super().forward(input_ids)

    seen = probe(Takes(block))
    assert seen.stopped is None and not seen.not_blocks
    assert {name: getattr(seen, name) for name in found} == found


def test_a_module_may_be_cast_in_a_forward():
    def casts(self, x):
        x = self.norm(x)
        self.norm.to(x.dtype)
        return self.q(x) + self.k(x)

    assert probe(Host(attention(casts, norm=nn.LayerNorm(D)))).stopped is None


def test_a_constant_of_the_models_own_is_left_as_it_is():
    constant = torch.ones(D)
    assert probe(Host(attention(lambda self, x: self.q(x) * constant + self.k(x)))).siblings
    assert not vars(constant)
