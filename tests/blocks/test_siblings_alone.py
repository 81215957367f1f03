"""What makes the layers of one input run alone."""

import pytest
import torch
from torch import nn

from tests.support.sibling_parents import assert_same, calls, outputs_and_gradients, together  # noqa: F401 (a fixture)

# ruff: noqa: F811 (the fixture's name)


def test_a_layer_that_is_called_outside_runs_alone(calls):
    parent, _ = together()
    parent.q(torch.randn(5, 6, dtype=torch.float64))
    assert not calls


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
