"""Weights for an engine that serves the merged model: merge_dora's bits, and a model that nothing happened to."""

import copy
import itertools

import peft
import pytest
import torch
from torch import nn

import dora_kernels as dk
from tests.support.fp8 import linear_fp8
from tests.support.nf4 import linear_4bit
from tests.support.peft_models import dora_config, peft_model
from tests.support.tiny_models import FAMILIES, assert_unchanged, logits, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")


def adapted(family="llama", dtype=torch.float32, **fields):
    torch.manual_seed(0)
    model = dk.apply_dora(FAMILIES[family](dtype), dk.DoraConfig(r=4, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def plain(merged):
    """Of the merged model: what it saves, tied weights once."""
    names = {name for name, _ in itertools.chain(merged.named_parameters(), merged.named_buffers())}
    return {name: tensor for name, tensor in merged.state_dict().items() if name in names}


@pytest.mark.parametrize("bucket_bytes", [1, 9000, 1 << 30])
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float32), ("t5", torch.float32)]
)
def test_merge_doras_weights_and_the_model_stays(family, dtype, bucket_bytes):
    model = adapted(family, dtype)
    before = snapshot(model)
    for _ in range(2):
        found = dict(dk.merged_weights(model, bucket_bytes=bucket_bytes))
    assert_unchanged(model, before)
    assert_same(found, plain(dk.merge_dora(model)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_patched_peft_model(family):
    model = peft_model(family, torch.float32)
    dk.patch_peft(model)
    before = copy.deepcopy(model.state_dict())
    found = dict(dk.merged_weights(model))
    assert_same(dict(model.state_dict()), before)
    served = FAMILIES[family](torch.float32)
    missing, unexpected = served.load_state_dict(found, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    served.tie_weights()
    torch.testing.assert_close(logits(served.eval()), logits(model.eval()), rtol=1e-4, atol=1e-5)


def test_what_peft_trains_in_full_is_the_trained_copy():
    torch.manual_seed(0)
    model = peft.get_peft_model(FAMILIES["llama"](torch.float32), dora_config(modules_to_save=["lm_head"]))
    dk.patch_peft(model)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    found = dict(dk.merged_weights(model))
    original = model.get_base_model().lm_head.original_module.weight
    assert torch.equal(found["lm_head.weight"], 2 * original)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_quantised_weights_are_decoded(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(linear_4bit(torch.randn(48, 64)), linear_fp8(32, 48), linear_4bit(torch.randn(64, 32)))
    model = dk.apply_dora(model, dk.DoraConfig(r=4, exclude_modules=["2"]))
    found = dict(dk.merged_weights(model, dtype=dtype))
    expected = plain(dk.merge_dora(model, base="dequantized"))
    assert_same(found, expected if dtype is None else {name: tensor.to(dtype) for name, tensor in expected.items()})


def test_no_more_than_a_bucket_is_made_ahead(monkeypatch):
    model = adapted()
    made, held = [], []
    merged_weight = dk.DoraLinear.merged_weight
    monkeypatch.setattr(
        dk.DoraLinear, "merged_weight", lambda *args: made.append(merged_weight(*args).nbytes) or merged_weight(*args)
    )
    limit = 10_000
    for name, tensor in dk.merged_weights(model, bucket_bytes=limit):
        if "_proj" in name:
            held.append(tensor.nbytes)
        assert sum(made) - sum(held) <= limit + max(made)
    assert sum(made) == sum(held) > 3 * limit


def test_nothing_is_computed_where_it_cannot_be_whole():
    with pytest.raises(ValueError, match="no DoRA layers"):
        dk.merged_weights(FAMILIES["llama"](torch.float32))
    with pytest.raises(ValueError, match="at least 1"):
        dk.merged_weights(adapted(), bucket_bytes=0)
    model = peft_model("llama", torch.float32)
    with pytest.raises(ValueError, match="is PEFT's Linear, which is not fused: patch_peft says why"):
        dk.merged_weights(model)
    dk.patch_peft(model)
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="cannot be merged: left to PEFT: its adapters are dis"),
    ):
        dk.merged_weights(model)
