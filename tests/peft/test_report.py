"""What `patch_peft` says: a line for every layer, and a sentence for every model that it cannot take."""

import subprocess
import sys
import warnings
from importlib import metadata
from unittest.mock import patch

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_kernels.ops import dispatch
from dora_kernels.peft import patch_peft, patched_peft, unpatch_peft
from tests.support.marks import slow
from tests.support.peft_models import count_fused, dora_config, infer, peft_model, step
from tests.support.tiny_models import llama


class Zoo(nn.Module):
    """One module of each kind that PEFT can give a DoRA adapter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.clipped = nn.Embedding(10, 8, max_norm=1.0)
        self.convolution = nn.Conv1d(4, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.linear = nn.Linear(8, 8)
        self.conv1d = Conv1D(8, 8)
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda module, inputs, output: output * 2)
        self.replaced = nn.Linear(8, 8)
        self.replaced.forward = lambda x: x
        self.scaled = type("Scaled", (nn.Linear,), {"forward": lambda self, x: super(nn.Linear, self).forward(x)})(8, 8)
        self.special = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


LEFT = {
    "clipped": "its base layer (Embedding) has max_norm=1.0",
    "grouped": "its base layer (Conv2d) has 2 groups and one lora_A",
    "hooked": "has hooks",
    "replaced": "had its forward replaced",
    "scaled": "its base layer (Scaled) has a forward of its own",
    "special": "computes its weight",
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:LoRA adapter added to ConvNd layer with groups")
def test_every_layer_has_its_line():
    fused = ["embedding", "convolution", "linear", "conv1d"]
    names = [*fused, *LEFT]
    model = peft.get_peft_model(Zoo(), dora_config(target_modules=names))
    report = patch_peft(model)
    prefix = "base_model.model."
    assert sorted(report.fused) == sorted(prefix + name for name in fused)
    assert report.skipped.keys() == {prefix + name for name in LEFT}
    for name, reason in LEFT.items():
        assert reason in report.skipped[prefix + name]
    lines = str(report).splitlines()
    assert len(lines) == len(names) + 1
    assert lines[-1] == f"{len(names)} layers: {len(fused)} fused, {len(LEFT)} left to PEFT"
    assert repr(report) == f"<PatchReport of {lines[-1]}>"
    assert f"{prefix}linear: fused" in lines
    assert f"{prefix}embedding: fused" in lines


def layer_of(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def _trained_base(layer):
    layer.base_layer.weight.requires_grad_(True)


def _meta(layer):
    layer.base_layer.to("meta")


def _quantised(layer):
    layer.base_layer.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)


def _sharded(layer):
    layer.base_layer.weight.data = torch.empty(0)


def _hooked(layer):
    layer.lora_A["default"].register_forward_hook(lambda *_: None)


def _replaced(layer):
    layer.forward = lambda x: x


def _dropout(layer):
    layer.lora_dropout["default"] = nn.AlphaDropout(0.1)


def _merged(layer):
    layer.merge()


def _disabled(layer):
    layer.enable_adapters(False)


def _moved(layer):
    layer.lora_A["default"].to("meta")


STATES = {
    "trained_base": (_trained_base, "its base layer (Linear) has a weight that is trained"),
    "meta": (_meta, "its weight on the meta device or offloaded: load it"),
    "quantised": (_quantised, "dtype torch.uint8, of no quantisation known here"),
    "sharded": (_sharded, "shape [0]: gather a sharded weight first"),
    "hooked_adapter": (_hooked, "has hooks"),
    "wrapped_layer": (_replaced, "its own forward was replaced"),
    "odd_dropout": (_dropout, "a dropout of its own"),
    "merged": (_merged, "are merged into its weight"),
    "disabled": (_disabled, "its adapters are disabled"),
    "two_devices": (_moved, "are on several devices"),
}


@pytest.mark.parametrize(("change", "reason"), STATES.values(), ids=STATES)
def test_a_layer_in_a_state_that_is_not_fused(change, reason):
    model = peft_model(dtype=torch.float32)
    change(layer_of(model))
    report = patch_peft(model)
    assert list(report.skipped) == ["base_model.model.model.layers.0.self_attn.q_proj"]
    assert reason in next(iter(report.skipped.values()))
    assert len(report.fused) == 13


def test_the_reason_is_looked_at_again_at_each_call():
    model = peft_model()
    handle = layer_of(model).lora_A["default"].register_forward_hook(lambda *_: None)
    assert len(patch_peft(model).skipped) == 1
    with count_fused() as calls:
        infer(model)
        assert len(calls) == 13
        handle.remove()
        infer(model)
        assert len(calls) == 13 + 14


def test_two_active_adapters_are_said():
    model = peft_model(target_modules=["q_proj"])
    model.add_adapter("other", dora_config(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.warns(UserWarning, match="fuses no layer of this model as it is now:\n.*it has 2 active adapters"):
        report = patch_peft(model)
    assert not report.fused
    model.set_adapter("other")
    assert len(patch_peft(model).fused) == 2


def test_accelerates_device_hooks_do_not_stand_in_the_way():
    hooks = pytest.importorskip("accelerate.hooks")
    plain, model = peft_model(), peft_model()
    for offload, fused in ((False, 14), (True, 13)):
        hook = hooks.AlignDevicesHook(execution_device="cpu", offload=offload)
        hooks.add_hook_to_module(layer_of(model).base_layer, hook)
        report = patch_peft(model)
        assert len(report.fused) == fused
        # PEFT's own DoRA fails with an offloaded layer.
        assert offload or torch.allclose(infer(model)["logits"], infer(plain)["logits"])
        hooks.remove_hook_from_module(layer_of(model).base_layer)


REFUSED = {
    "plain": (lambda: llama(), ValueError, "found no LoRA layer of PEFT in this LlamaForCausalLM: .*apply_dora"),
    "lora": (
        lambda: peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])),
        ValueError,
        r"LoRA adapters without DoRA.*LoraConfig\(use_dora=True\)",
    ),
    "no_module": (lambda: "model", TypeError, "should be a torch.nn.Module, got str"),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_models_without_dora_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        patch_peft(make())


@pytest.mark.parametrize("option", ["space", "impl", "rounding"])
def test_options_are_checked_before_anything_changes(option):
    model = peft_model()
    classes = [type(m) for m in model.modules()]
    for call in (lambda o: patch_peft(model, **o), lambda o: patched_peft(**o).__enter__()):
        with pytest.raises(ValueError, match=f"`{option}` should be one of"):
            call({option: "fast"})
    assert [type(m) for m in model.modules()] == classes


def test_a_forced_implementation_that_is_absent_is_refused_before_anything_changes():
    model = peft_model()
    absent = patch.object(dispatch, "_why_no_triton", lambda device: "there is none")
    with absent, pytest.raises(ValueError, match="not available: there is none"):
        patch_peft(model, impl="triton")
    assert not any(type(m).__name__ == "FusedLinear" for m in model.modules())


def test_a_frozen_magnitude_is_warned_of():
    model, frozen = peft_model(), peft_model().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_peft(model)
        patch_peft(frozen)
    layer_of(model).lora_magnitude_vector["default"].requires_grad_(False)
    with pytest.warns(UserWarning, match="1 magnitudes do not require gradients.*trains plain LoRA"):
        patch_peft(model)
    step(model)


def test_an_untested_version_is_warned_of(monkeypatch):
    found = metadata.version
    monkeypatch.setattr("dora_kernels.peft.patch.version", lambda name: "0.99.0" if name == "peft" else found(name))
    with pytest.warns(UserWarning, match="PEFT 0.99.0 is untested with dora_kernels"):
        patch_peft(peft_model())


@pytest.mark.parametrize("call", ["patch_peft(Linear(2, 2))", slow("patched_peft().__enter__()")])
def test_without_peft(call, tmp_path):
    program = f"""
import sys
sys.modules["peft"] = None
import importlib.metadata as m
found = m.version
def version(name):
    if name == "peft":
        raise m.PackageNotFoundError(name)
    return found(name)
m.version = version
from torch.nn import Linear
from dora_kernels.peft import patch_peft, patched_peft
try:
    {call}
except ImportError as error:
    print(error)
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "peft>=0.21" in shown
    assert "pip install" in shown


def test_a_plan_says_what_would_run():
    model = peft_model(dtype=torch.float32, lora_dropout=0.1)
    patch_peft(model, impl="reference")
    layer = layer_of(model)
    assert layer.plan(tokens=8)[:2] == ("token", "reference")
    assert "dropout" in layer.plan(tokens=8).reason
    assert layer.eval().plan(tokens=4096).space == "weight"
    assert layer.rank == 4
    _disabled(layer)
    assert layer.plan(tokens=8).reason == "left to PEFT: its adapters are disabled"


def test_the_views_that_fsdp_puts_in_a_weights_place_are_dense():
    model = peft_model()
    for tensor, fused in ((torch.zeros(32, 32).double(), 14), (torch.zeros(0).double(), 13)):
        layer_of(model).base_layer._parameters["weight"] = tensor
        assert len(patch_peft(model).fused) == fused


def test_unpatching_what_was_never_patched_is_harmless():
    model = peft_model()
    assert unpatch_peft(model) is model
