"""Several adapters in one patched PEFT model: merged in any order, in part or weighted, it means what PEFT means."""

import itertools

import pytest
import torch

from dora_kernels.peft import patch_peft
from tests.support.peft_models import assert_close, count_fused, dora_config, infer, trained, twins

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMES = ("default", "second", "third")
LAYERS = 2  # of the 14, so that the twelve models are cheap


@pytest.fixture
def models():
    """An unpatched and a patched model with three trained adapters, in eval mode."""
    pair = twins(target_modules=["q_proj"])
    for model in pair:
        for seed, name in enumerate(NAMES[1:], 2):
            torch.manual_seed(seed)
            model.add_adapter(name, dora_config(r=1 + seed, target_modules=["q_proj"]))
            trained(model, seed, name)
        model.eval()
    patch_peft(pair[1])
    return pair


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}


@pytest.mark.parametrize("name", NAMES)
def test_each_merged_equals_its_forward(models, name):
    _, patched = models
    patched.set_adapter(name)
    with count_fused() as calls:
        expected = infer(patched)
    assert len(calls) == LAYERS
    patched.merge_adapter()
    assert_close(infer(patched), expected)


@pytest.mark.parametrize("size", [2, 3])
def test_merged_in_any_order_as_peft_merges_them(models, size):
    for order in itertools.permutations(NAMES, size):
        results = []
        for model in models:
            model.merge_adapter(list(order))
            results.append(infer(model) | weights(model))
            model.unmerge_adapter()
            results[-1] |= {f"unmerged {name}": weight for name, weight in weights(model).items()}
        assert_close(*reversed(results))


def test_merged_in_part(models):
    """One of two active adapters is merged: PEFT then has all or nothing merged, and so have we."""
    results = []
    for model in models:
        model.base_model.set_adapter(["default", "second"])
        model.merge_adapter(["second"])
        results.append(infer(model) | weights(model))
    assert_close(*reversed(results))


def test_weighted(models):
    """PEFT's combinations know A and B alone: what it makes of them, and of their magnitudes."""
    outcomes = []
    for model in models:
        model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type="svd")
        model.set_adapter("both")
        outcomes.append(infer(model))
    assert_close(*reversed(outcomes))
