"""Files of a patched model: PEFT's own, written and read by PEFT and transformers; and merging."""

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dora_kernels as dk
from dora_kernels.models.modules import dora_layers
from dora_kernels.peft import patch_peft
from tests.support.peft_models import assert_close, count_fused, infer, peft_model, trained, twins
from tests.support.tiny_models import llama, logits
from tests.tolerances import SAME_FP32

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WEIGHTS = "adapter_model.safetensors"
READ_BACK = 1e-6
"""Of an adapter that passed through files. They hold fp64 adapters in fp64, and who reads them makes fp32 of them."""


def test_a_patched_model_saves_pefts_files_and_loads_into_one(tmp_path):
    plain, patched = twins()
    patch_peft(patched)
    for name, model in (("plain", plain), ("patched", patched)):
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / WEIGHTS) for name in ("plain", "patched")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())
    configs = [peft.PeftConfig.from_pretrained(tmp_path / name).to_dict() for name in ("plain", "patched")]
    assert configs[0] == configs[1]

    again = peft.PeftModel.from_pretrained(llama(torch.float64), tmp_path / "patched")
    patch_peft(again)
    assert_close(infer(again), infer(plain.eval()), READ_BACK)


def test_loading_a_second_adapter_and_its_weights(tmp_path):
    trained(peft_model(), seed=7).save_pretrained(tmp_path)
    plain, patched = twins()
    patch_peft(patched)
    for model in (plain, patched):
        model.load_adapter(tmp_path, "second")
        model.set_adapter("second")
    with count_fused() as calls:
        assert_close(infer(patched), infer(plain), READ_BACK)
    assert len(calls) == 14
    patched.load_state_dict(patched.state_dict())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hotswap(tmp_path):
    trained(peft_model(dtype=torch.float32), seed=7).save_pretrained(tmp_path)
    # PEFT's hotswap reads the magnitude under transformers' key alone.
    weights = tmp_path / WEIGHTS
    tensors = {key + ".weight" * key.endswith("vector"): value for key, value in load_file(weights).items()}
    save_file(tensors, weights)
    plain, patched = twins(dtype=torch.float32)
    before = infer(plain)
    patch_peft(patched)
    for model in (plain, patched):
        hotswap_adapter(model, str(tmp_path), "default")
    with count_fused() as calls:
        assert_close(infer(patched), infer(plain), SAME_FP32)
    assert len(calls) == 14
    assert not torch.allclose(infer(patched)["logits"], before["logits"])


def test_a_patched_models_adapter_is_read_by_load_adapter(tmp_path):
    patched = peft_model(dtype=torch.float32).eval()
    patch_peft(patched)
    patched.save_pretrained(tmp_path)
    ours = dk.load_adapter(llama(), tmp_path)
    assert torch.allclose(logits(ours), logits(patched), atol=READ_BACK)


def test_transformers_from_pretrained_on_an_adapter_folder(tmp_path):
    """transformers drops the magnitude under PEFT's key in silence, and keeps it under `compat="transformers"`."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = dk.apply_dora(llama(), dk.DoraConfig(r=4, lora_alpha=8))
    with torch.no_grad():
        for layer in dora_layers(model).values():
            layer.lora_B.normal_(std=0.1)
            layer.magnitude.mul_(1.2)
    errors = {}
    for compat in ("peft", "transformers"):
        model.config._name_or_path = str(tmp_path / "base")
        dk.save_adapter(model, tmp_path / compat, compat=compat)
        config = peft.LoraConfig.from_pretrained(tmp_path / compat)
        config.base_model_name_or_path = str(tmp_path / "base")
        config.save_pretrained(tmp_path / compat)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / compat)
        errors[compat] = (logits(loaded) - logits(model)).norm() / logits(model).norm()
    assert errors["transformers"] < READ_BACK
    assert errors["peft"] > 0.05, "transformers reads PEFT's key now: compat is no longer needed"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_merge_dora_and_pefts_merge_agree(dtype, tmp_path):
    model = peft_model(dtype=dtype)
    model.save_pretrained(tmp_path)
    ours = dk.merge_dora(dk.load_adapter(llama(dtype), tmp_path))
    pefts = peft.PeftModel.from_pretrained(llama(dtype), tmp_path).merge_and_unload()
    assert_close(dict(ours.state_dict()), dict(pefts.state_dict()), READ_BACK)
