"""Adapters that come after patching: on modules that had none, from transformers' own loader, and inside a scope."""

import peft
import pytest
import torch

import dora_kernels as dk
from dora_kernels.models.modules import dora_layers
from dora_kernels.peft import patch_peft, patched_peft, unpatch_peft
from tests.support.peft_models import assert_close, count_fused, dora_config, infer, step, trained, twins
from tests.support.tiny_models import llama, logits
from tests.tolerances import SAME_FP32

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LAYER = "base_model.model.model.layers.{}.{}"
OLD = [LAYER.format(i, "self_attn.q_proj") for i in range(2)]
NEW = [LAYER.format(i, "mlp.up_proj") for i in range(2)]


def with_another(model, targets):
    torch.manual_seed(1)
    model.add_adapter("other", dora_config(target_modules=targets))
    trained(model, seed=5, adapter="other").set_adapter("other")
    return model


def test_patching_again_takes_in_modules_that_had_no_adapter():
    plain, patched = twins(target_modules=["q_proj"])
    patch_peft(patched)
    for model in (plain, patched):
        with_another(model, ["up_proj"])
    with count_fused() as calls:
        assert_close(step(patched), step(plain))
    assert not calls, "the new layers are PEFT's own until they are patched"
    report = patch_peft(patched)
    assert report.fused == NEW
    assert report.skipped == dict.fromkeys(OLD, "it has 0 active adapters; fused is exactly one")
    with count_fused() as calls:
        assert_close(step(patched), step(plain))
    assert len(calls) == 2
    # Each layer has one of the two.
    for model in (plain, patched):
        model.base_model.set_adapter(["default", "other"])
    assert sorted(patch_peft(patched).fused) == sorted(OLD + NEW)
    with count_fused() as calls:
        assert_close(step(patched), step(plain))
    assert len(calls) == 4
    patched.delete_adapter("default")
    assert patch_peft(patched).fused == NEW
    unpatch_peft(patched)
    assert {type(module) for module in patched.modules()} <= {type(module) for module in plain.modules()}


def test_a_fresh_adapter_added_since_is_an_exact_no_op_once_patched_again():
    base = logits(llama(torch.bfloat16))
    model = peft.get_peft_model(llama(torch.bfloat16), dora_config(target_modules=["q_proj"])).eval()
    patch_peft(model)
    model.add_adapter("other", dora_config(target_modules=["q_proj", "up_proj"]))
    model.set_adapter("other")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "vector.other" in name}
    assert not torch.equal(logits(model), base)
    assert len(patch_peft(model).fused) == len(before) == 4
    assert torch.equal(logits(model), base)
    unpatch_peft(model)
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value), name


def test_a_scope_takes_in_what_is_added_to_a_patched_model_and_gives_its_options_back():
    plain, patched = twins(target_modules=["q_proj"])
    with_another(plain, ["q_proj", "up_proj"])
    patch_peft(patched, rounding="nearest", space="weight")
    layers = [patched.get_submodule(path) for path in OLD]
    options = [layer.dora_fusion.options.copy() for layer in layers]
    with patched_peft(space="token"):
        with_another(patched, ["q_proj", "up_proj"])
        with count_fused() as calls:
            assert_close(step(patched), step(plain))
        assert [call["space"] for call in calls] == ["token"] * 4
    assert [layer.dora_fusion.options for layer in layers] == options
    with count_fused() as calls:
        assert_close(step(patched), step(plain))
    assert len(calls) == 2, "what was patched before the scope stays so"


def test_an_unpatched_model_that_was_extended_inside_is_given_back():
    plain, model = twins(target_modules=["q_proj"])
    with patched_peft():
        with_another(model, ["up_proj"])
        unpatch_peft(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in with_another(plain, ["up_proj"]).modules()}


@pytest.mark.parametrize("compat", ["peft", "transformers"])
def test_what_transformers_loads_is_fused(compat, tmp_path):
    ours = dk.apply_dora(llama(), dk.DoraConfig(r=4, lora_alpha=8))
    with torch.no_grad():
        for layer in dora_layers(ours).values():
            layer.lora_B.normal_(std=0.1)
            layer.magnitude.mul_(1.2)
    dk.save_adapter(ours, tmp_path, compat=compat)
    plain, patched = llama(), llama()
    for model in (plain, patched):
        model.load_adapter(str(tmp_path))
    assert len(patch_peft(patched).fused) == 14
    with count_fused() as calls:
        assert_close(infer(patched), infer(plain), SAME_FP32)
    assert len(calls) == 14
    kept = torch.allclose(logits(patched), logits(ours), atol=SAME_FP32)
    assert kept == (compat == "transformers"), "transformers drops the magnitude under PEFT's key"
