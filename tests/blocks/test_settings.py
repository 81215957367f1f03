"""Settings that an MLP's own forward reads: where they set a module apart, or change, it runs its layers alone."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

import dora_kernels as dk
from tests.blocks.test_mlp import base, calls  # noqa: F401 (a fixture)


class ClampedMLP(LlamaMLP):
    """Of a model's own code: a setting says whether it is the gated MLP that it looks like."""

    limit = None

    def forward(self, x):
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if (limit := self.limit) is not None:
            hidden = hidden.clamp(max=limit[0] if isinstance(limit, list) else limit)
        if hasattr(self, "most"):
            hidden = hidden.minimum(self.most)
        return self.down_proj(hidden)


class NumberedMLP(ClampedMLP):
    def __init__(self, config, layer_idx):
        super().__init__(config)
        self.layer_idx, self.limits = layer_idx, [None, 1e-3]

    def forward(self, x):
        self.limit = self.limits[self.layer_idx]
        return super().forward(x)


SETTINGS = {
    "a whole number": lambda mlp, index: setattr(mlp, "limit", (10**6, 0)[index]),
    "a list": lambda mlp, index: setattr(mlp, "limit", ([10**6], [0])[index]),
    "a buffer": lambda mlp, index: mlp.register_buffer("most", torch.tensor((1e6, 1e-3)[index])),
}


def clamped(settings=lambda mlp, index: None, kind=lambda config, index: ClampedMLP(config)):
    model = base()
    torch.manual_seed(2)
    for index, layer in enumerate(model.model.layers):
        layer.mlp = kind(model.config, index).double()
        settings(layer.mlp, index)
    return model.train()


def loss_of(model):
    ids = torch.arange(3, 23)[None]
    return model(input_ids=ids, labels=ids).loss.item()


@pytest.mark.parametrize("what", SETTINGS)
def test_mlps_that_a_setting_sets_apart(what):
    """The first is looked at. Its clamp is none, that of the second is one."""
    model = clamped(SETTINGS[what])
    expected = loss_of(model)
    assert loss_of(dk.apply_dora(model, dk.DoraConfig(r=4)).train()) == pytest.approx(expected, rel=1e-6)


def test_mlps_that_their_number_sets_apart():
    model = clamped(kind=NumberedMLP)
    expected = loss_of(model)
    assert loss_of(dk.apply_dora(model, dk.DoraConfig(r=4)).train()) == pytest.approx(expected, rel=1e-6)


def test_a_setting_that_changes(calls, monkeypatch):  # noqa: F811
    """Of a module, and of its class: then the module's own forward runs; the next model is looked at again."""
    model = dk.apply_dora(clamped(), dk.DoraConfig(r=4)).train()
    unclamped = loss_of(model)
    assert len(calls) == 2
    model.model.layers[1].mlp.limit = 1e-3
    alone = loss_of(model)
    assert len(calls) == 3 and alone != pytest.approx(unclamped, rel=1e-6)
    assert model.model.layers[1].mlp.block_plans(20) == "its layers run alone: `limit` is another than it was"
    monkeypatch.setattr(ClampedMLP, "limit", 1e-3)
    assert loss_of(model) != pytest.approx(alone, rel=1e-6) and len(calls) == 3
    other = clamped()
    expected = loss_of(other)
    assert loss_of(dk.apply_dora(other, dk.DoraConfig(r=4)).train()) == pytest.approx(expected, rel=1e-6)
    assert len(calls) == 3
