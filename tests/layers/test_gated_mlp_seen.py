"""A gated MLP is recognised by what it computes, and what is almost one is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dora_kernels.layers import probe as room
from dora_kernels.layers.blocks_seen import Siblings
from dora_kernels.layers.dataflow import LONGEST
from dora_kernels.layers.gated_mlp_seen import GatedMlp
from dora_kernels.layers.probe import probe
from dora_kernels.layers.probe_inputs import TOKENS
from tests.support.one_block import D, Host, N, mlp, module

SILU = GatedMlp("gate", "up", "down", "silu")
STACKED = GatedMlp("both", "both", "down", "silu")
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh")}


@pytest.fixture(autouse=True)
def _nothing_seen_before(monkeypatch):
    monkeypatch.setattr(room, "SEEN", {})


def computed_by(block, found, x):
    """By the formula alone."""
    gate, up = block.get_submodule(found.gate)(x), block.get_submodule(found.up)(x)
    if found.gate == found.up:
        first, second = gate[..., : gate.shape[-1] // 2], gate[..., gate.shape[-1] // 2 :]
        gate, up = (second, first) if found.up_first else (first, second)
    return block.get_submodule(found.down)(ACTIVATIONS[found.activation](gate) * up)


def first_half_is_up(self, x):
    up, gate = self.both(x).chunk(2, dim=-1)
    return self.down(up * F.silu(gate))


def in_slices(self, x):
    both = self.both(x)
    return self.down(F.silu(both[..., :N]) * both[..., N:])


def from_the_end(self, x):
    both = self.both(x)
    return self.down(F.silu(both[..., :-N]) * both[..., -N:])


def in_sizes(self, x):
    gate, up = self.both(x).split([N, N], dim=2)
    return self.down(F.silu(gate) * up)


def in_halves(self, x):
    gate, up = self.both(x).chunk(2, dim=-1)
    return self.down(F.silu(gate) * up)


ACCEPTED = {
    "silu": (mlp(lambda self, x: self.down(F.silu(self.gate(x)) * self.up(x))), SILU),
    "a_module": (mlp(lambda self, x: self.down(self.up(x) * self.act(self.gate(x))), act=nn.SiLU()), SILU),
    "gelu": (
        mlp(lambda self, x: self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))),
        SILU._replace(activation="gelu_tanh"),
    ),
    "other_names": (
        mlp(lambda self, x: self.gate(F.silu(self.up(x)) * self.down(x)), gate=(N, D), up=(D, N), down=(D, N)),
        GatedMlp("up", "down", "gate", "silu"),
    ),
    "no_dropout": (mlp(lambda self, x: self.down(F.dropout(F.silu(self.gate(x)) * self.up(x), 0.0))), SILU),
    "deeper": (
        mlp(
            lambda self, x: self.parts[2](F.silu(self.parts[0](x)) * self.parts[1](x)),
            parts=nn.ModuleList([nn.Linear(D, N), nn.Linear(D, N), nn.Linear(N, D)]),
        ),
        GatedMlp("parts.0", "parts.1", "parts.2", "silu"),
    ),
    "halves": (mlp(in_halves), STACKED),
    "halves_up_first": (mlp(first_half_is_up), STACKED._replace(up_first=True)),
    "slices": (mlp(in_slices), STACKED),
    "slices_from_the_end": (mlp(from_the_end), STACKED),
    "sizes": (mlp(in_sizes), STACKED),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_gated_mlp(name):
    block, expected = ACCEPTED[name]
    seen = probe(Host(block))
    assert seen[2:] == (None, {"block": expected}, {}, {})
    x = torch.randn(1, 3, D)
    assert torch.equal(block.eval()(x), computed_by(block, expected, x))


def drops(self, x):
    return self.down(F.dropout(F.silu(self.gate(x)) * self.up(x), 0.1, self.training))


def clamps(self, x):
    return self.down(F.silu(self.gate(x).clamp(max=7.0)) * self.up(x))


def clamps_in_training(self, x):
    up = self.up(x)
    return self.down(F.silu(self.gate(x)) * (up.clamp(max=7.0) if self.training else up))


def clamps_in_inference(self, x):
    up = self.up(x)
    return self.down(F.silu(self.gate(x)) * (up if self.training else up.clamp(max=7.0)))


def other_in_training(self, x):
    gate = self.gate(x)
    return self.down((F.silu(gate) if self.training else F.gelu(gate, approximate="tanh")) * self.up(x))


def looks_at_gate(self, x):
    gate = self.gate(x)
    self.seen = gate.mean().item()
    return self.down(F.silu(gate) * self.up(x))


def without_gradients(self, x):
    with torch.no_grad():
        gate = F.silu(self.gate(x))
    return self.down(gate * self.up(x))


def half_squared(self, x):
    half = F.silu(self.both(x).chunk(2, dim=-1)[0])
    return self.down(half * half)


def routes(self, x):
    y = self.down(F.silu(self.gate(x)) * self.up(x))
    self.both(x)
    return y


def keeps(self, x):
    self.kept = self.gate(x)
    return self.down(F.silu(self.kept) * self.up(x))


def writes_output(self, x):
    gate = self.gate(x)
    gate.mul_(2)
    return self.down(F.silu(gate) * self.up(x))


def writes_input(self, x):
    gate = F.silu(self.gate(x))
    x.mul_(2)
    return self.down(gate * self.up(x))


def gates_itself(self, x):
    gate = self.gate(x)
    return self.down(F.silu(gate) * gate)


def half_gates_itself(self, x):
    half = self.both(x).chunk(2, dim=-1)[0]
    return self.down(F.silu(half) * half)


def half_of_one(self, x):
    return self.down(F.silu(self.both(x)[..., :N]) * self.up(x))


def every_second(self, x):
    both = self.both(x)
    return self.down(F.silu(both[..., ::2]) * both[..., 1::2])


def in_tokens(self, x):
    first, second = self.both(x).chunk(2, dim=1)
    return self.down(F.silu(first) * second)


def in_slices_of_tokens(self, x):
    both = self.both(x)
    return self.down(F.silu(both[:, : TOKENS // 2]) * both[:, TOKENS // 2 :])


def in_thirds(self, x):
    gate, up, _ = self.both(x).chunk(3, dim=-1)
    return self.down(F.silu(gate) * up)


def in_unequal_slices(self, x):
    both = self.both(x)
    return self.down(F.silu(both[..., : N + 1]) * both[..., N - 1 :])


REFUSED = {
    "drops values out in training": mlp(drops),
    "computes clamp between its layers": mlp(clamps),
    "computes clamp between its layers, in training": mlp(clamps_in_training),
    "computes clamp between its layers, in inference": mlp(clamps_in_inference),
    "does not compute the same in every call": mlp(other_in_training),
    "computes mul between its layers": mlp(lambda self, x: self.down(F.silu(self.gate(x) * 0.5) * self.up(x))),
    "computes mul before down": mlp(lambda self, x: self.down(F.silu(self.gate(x)) * self.up(x) * 0.5)),
    "computes add before down": mlp(lambda self, x: self.down(F.silu(self.gate(x)) + self.up(x))),
    "computes native_layer_norm before down": mlp(
        lambda self, x: self.down(self.norm(F.silu(self.gate(x)) * self.up(x))), norm=nn.LayerNorm(N)
    ),
    "activates by relu, not by silu or gelu_tanh": mlp(lambda self, x: self.down(F.relu(self.gate(x)) * self.up(x))),
    "activates by gelu, not by silu or gelu_tanh": mlp(lambda self, x: self.down(F.gelu(self.gate(x)) * self.up(x))),
    "activates by sigmoid, not by silu or gelu_tanh": mlp(
        lambda self, x: self.down(torch.sigmoid(self.gate(x)) * self.up(x))
    ),
    "computes silu between its layers": mlp(lambda self, x: self.down(F.silu(self.gate(x)) * F.silu(self.up(x)))),
    "computes more after its activation": mlp(
        lambda self, x: self.down((F.silu(self.gate(x)) + 1.0) * self.up(x)),
    ),
    "computes mean besides": mlp(looks_at_gate),
    "calls both besides": mlp(routes),
    "calls gate twice": mlp(lambda self, x: self.gate(F.silu(self.gate(x)) * self.up(x)), gate=(D, D), up=(D, D)),
    "calls gate besides": mlp(lambda self, x: (self.gate(x), self.down(F.silu(self.gate(x)) * self.up(x)))[1]),
    "keeps a tensor from between its layers": mlp(keeps),
    "writes in place (mul_)": mlp(writes_output),
    "writes in place (mul_), on its input": mlp(writes_input),
    "writes in place (silu_)": mlp(lambda self, x: self.down(F.silu(self.gate(x), inplace=True) * self.up(x))),
    "does not give gate and up the tensor that it got": mlp(
        lambda self, x: self.down(F.silu(self.gate(x.clone())) * self.up(x))
    ),
    "does not give gate and up the tensor that it got, up": mlp(
        lambda self, x: self.down(F.silu(self.gate(x)) * self.up(x.clone()))
    ),
    "returns something else than down's output": mlp(
        lambda self, x: (self.down(F.silu(self.gate(x)) * self.up(x)),),
    ),
    "computes add besides": mlp(lambda self, x: x + self.down(F.silu(self.gate(x)) * self.up(x))),
    "has no gate": mlp(lambda self, x: self.down(F.silu(self.gate(x)))),
    "has no gate, itself": mlp(gates_itself),
    "has no gate, half": mlp(half_gates_itself),
    "has no gate, squared": mlp(half_squared),
    "turns gradients on or off inside": mlp(without_gradients),
    "multiplies features of different shapes": mlp(
        lambda self, x: self.down(F.silu(self.gate(x)) * self.up(x)), up=(D, 1)
    ),
    "uses half of a layer's output": mlp(half_of_one),
    "computes slice between its layers, every second": mlp(every_second),
    "computes split between its layers, of tokens": mlp(in_tokens, both=(D, TOKENS), down=(TOKENS, D)),
    "computes slice between its layers, of tokens": mlp(in_slices_of_tokens, both=(D, TOKENS), down=(TOKENS, D)),
    "computes split between its layers, thirds": mlp(in_thirds, down=(2 * N // 3, D)),
    "computes slice between its layers, unequal": mlp(in_unequal_slices, down=(N + 1, D)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_almost_a_gated_mlp(name):
    seen = probe(Host(REFUSED[name]))
    assert seen.stopped is None and not seen.mlps
    assert seen.not_blocks == {"block": name.partition(", ")[0] if ", not" not in name else name}


def fits(self, x, scale=1):
    return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.inner(x=x) + 1,
        lambda self, x: self.inner(x, 2) + 1,
        lambda self, x: self.inner(x, scale=2) + 1,
    ],
    ids=["by_name", "with_a_scale", "with_a_named_scale"],
)
def test_a_gated_mlp_gets_one_tensor_alone(forward):
    seen = probe(Host(module(forward, inner=mlp(fits))))
    assert not seen.mlps and seen.not_blocks == {"block.inner": "is not called with one tensor alone"}


def test_a_gated_mlp_calls_its_own_layers():
    one, two = mlp(fits), mlp(fits)
    two.gate = one.gate
    seen = probe(Host(module(lambda self, x: self.one(x) + self.two(x), one=one, two=two)))
    assert seen.mlps == {"block.one": SILU} and seen.not_blocks == {"block.two": "calls a layer outside itself"}


def test_of_a_long_call_nothing_is_said():
    def computes_long(self, x):
        y = fits(self, x)
        for _ in range(LONGEST):
            y = y + 1
        return y

    assert probe(Host(mlp(computes_long)))[3:] == ({}, {"block": (Siblings(("gate", "up")),)}, {})
