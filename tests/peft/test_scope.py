"""`patched_peft`: whatever builds, extends or loads a PEFT model inside gets fused layers, and nothing stays behind."""

import gc
import warnings
import weakref

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner

from dora_kernels import DoraConfig, apply_dora
from dora_kernels.blocks.fuse import fused_blocks
from dora_kernels.models.modules import dora_layers
from dora_kernels.peft import patch_peft, patched_peft
from tests.support.peft_models import assert_close, count_fused, dora_config, infer, peft_model, step, trained
from tests.support.tiny_models import llama, logits
from tests.tolerances import SAME_FP32

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
METHODS = ("inject_adapter", "_cast_adapter_dtype")


def fused_layers(model):
    return sum(type(module).__name__ == "FusedLinear" for module in model.modules())


def _built(folder):
    return peft_model(dtype=torch.float32)


def _loaded(folder):
    return peft.PeftModel.from_pretrained(llama(), folder)


def _loaded_lean(folder):
    return peft.PeftModel.from_pretrained(llama(), folder, low_cpu_mem_usage=True)


def _injected(folder):
    torch.manual_seed(0)
    model = llama()
    peft.inject_adapter_in_model(dora_config(), model)
    return trained(model)


WAYS = {"built": _built, "loaded": _loaded, "loaded_lean": _loaded_lean, "injected": _injected}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_models_made_inside_are_fused_and_undone(way, tmp_path):
    peft_model(dtype=torch.float32).save_pretrained(tmp_path)
    originals = {name: getattr(BaseTuner, name) for name in METHODS}
    expected = infer(way(tmp_path).eval())
    with patched_peft(impl="reference"):
        model = way(tmp_path).eval()
        with count_fused() as calls:
            inside = infer(model)
        assert len(calls) == fused_layers(model) == 14
    assert fused_layers(model) == 0
    assert {name: getattr(BaseTuner, name) for name in METHODS} == originals
    assert_close(inside, expected, SAME_FP32)
    assert_close(infer(model), expected, SAME_FP32)


@pytest.mark.parametrize(("blocks", "count"), [("auto", 4), (False, 0)])
def test_blocks_are_made_inside_and_undone(blocks, count):
    patched_before = peft_model()
    patch_peft(patched_before)
    with patched_peft(blocks=blocks):
        model = peft_model()
        patched_before.add_adapter("other", dora_config())
        assert len(fused_blocks(model)) == count
    assert not fused_blocks(model)
    assert len(fused_blocks(patched_before)) == 4


def test_adapters_added_inside_are_fused_and_models_from_before_are_not():
    before = peft_model()
    with patched_peft():
        model = peft_model()
        model.add_adapter("other", dora_config(target_modules=["q_proj", "lm_head"]))
        model.set_adapter("other")
        with count_fused() as calls:
            infer(model)
        assert len(calls) == 3
        assert fused_layers(before) == 0
    assert fused_layers(model) == 0


def test_a_fresh_adapter_is_an_exact_no_op_inside():
    base = logits(llama(torch.bfloat16))
    with patched_peft():
        model = peft.get_peft_model(llama(torch.bfloat16), dora_config()).eval()
        assert torch.equal(logits(model), base)
        model.add_adapter("other", dora_config())
        model.set_adapter("other")
        assert torch.equal(logits(model), base)
    assert not torch.equal(logits(model), base)


def test_other_tuners_pass_through():
    with patched_peft():
        model = peft.get_peft_model(llama(), peft.IA3Config(task_type="CAUSAL_LM"))
        lora = peft.get_peft_model(llama(), dora_config(use_dora=False))
        with count_fused() as calls:
            infer(model)
            infer(lora)
    assert not calls


def test_an_exception_undoes_it_too():
    originals = {name: getattr(BaseTuner, name) for name in METHODS}
    with pytest.raises(KeyError), patched_peft():
        model = peft_model()
        raise KeyError
    assert fused_layers(model) == 0
    assert {name: getattr(BaseTuner, name) for name in METHODS} == originals


def test_scopes_nest():
    with patched_peft():
        with patched_peft():
            model = peft_model()
        assert fused_layers(model) == 14, "the outer scope is open"
        assert fused_layers(peft_model()) == 14
    assert fused_layers(model) == 0


def test_the_scope_keeps_no_model_alive():
    with patched_peft():
        model = peft_model()
        gone = weakref.ref(model.base_model.model.model.layers[0].mlp.up_proj)
        del model
        gc.collect()
        assert gone() is None


def salts(model):
    return [m.dora_fusion.options["salt"] for m in model.modules() if hasattr(m, "dora_fusion")]


def test_layers_round_each_its_own_way_the_same_one_by_every_route():
    patched = peft_model()
    patch_peft(patched)
    ours = apply_dora(llama(), DoraConfig())
    expected = [layer.salt for layer in dora_layers(ours).values()]
    assert len(set(expected)) == 14
    assert salts(patched) == expected
    with patched_peft():
        assert salts(peft_model()) == expected


def test_training_inside_trains_the_magnitude():
    with patched_peft():
        model = peft_model()
        gradients = step(model)
    assert all(value.any() for name, value in gradients.items() if "magnitude" in name)


@pytest.mark.parametrize("mode, warned", [("train", True), ("eval", False)])
def test_leaving_a_model_in_training_mode_is_said(mode, warned):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with patched_peft():
            model = peft_model(dtype=torch.float32)  # the scope keeps none alive
            getattr(model, mode)()
    (path,) = {warning.filename for warning in said if "still in training mode" in str(warning.message)} or {None}
    assert path == (__file__ if warned else None)


def test_what_patch_peft_patched_stays_and_is_not_warned_of():
    model = peft_model(dtype=torch.float32)
    patch_peft(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with patched_peft():
            model.add_adapter("second", dora_config())
            model.train()
    assert fused_layers(model)
