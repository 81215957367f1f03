"""A module whose layers share an input, and its twin, whose layers run alone."""

import pytest
import torch
from torch import nn

import dora_kernels as dk
from dora_kernels.blocks import siblings as room
from dora_kernels.blocks.siblings import share_inputs

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
