"""Whatever changes a fused layer's answer is seen at the next call."""

import copy

import pytest
import torch
from peft.helpers import DoraCaching
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from dora_kernels.peft import eligibility, patch_peft
from tests.support.oracle import relative_error
from tests.support.peft_layer import X, call, layer_of, peft_model
from tests.support.peft_models import FP64


def inside(layer, name):
    return layer.base_layer if name == "base_layer" else getattr(layer, name)["default"]


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _hook(name, register, hook):
    return lambda model: getattr(inside(layer_of(model), name), register)(hook)


def _hooks():
    """A hook of each kind on each module inside the layer that runs in PEFT's forward."""
    doubling = {
        "register_forward_hook": lambda module, args, y: 2 * y,
        "register_forward_pre_hook": lambda module, args: (2 * args[0], *args[1:]),
        "register_full_backward_hook": lambda module, grad_x, grad_y: None,
        "register_full_backward_pre_hook": lambda module, grad_y: None,
    }
    for name in ("base_layer", "lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector"):
        for register, hook in doubling.items():
            if name != "lora_magnitude_vector" or "backward" in register:
                yield f"{register}-{name}", _hook(name, register, hook)


def _replace_forward(name):
    def change(model):
        module = inside(layer_of(model), name)
        module.forward = lambda *args, forward=module.forward: 2 * forward(*args)

    return change


def _set_weight(model, name, assign):
    state = {key: 2 * value for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


def _new_class(model):
    layer_of(model).base_layer.__class__ = DoubledLinear


class UnknownParameter(nn.Parameter):
    """A format that the engine does not know, by its class alone."""


def _new_weight_class(model):
    base = layer_of(model).base_layer
    base.weight = UnknownParameter(base.weight.data, requires_grad=False)


def _tensor_scaling(model):
    layer_of(model).scaling["default"] = torch.tensor(3.0, dtype=torch.float64)


def _bias_of_B(model):
    layer_of(model).lora_B["default"].bias = nn.Parameter(torch.ones(12, dtype=torch.float64))


def _dropout(model):
    layer_of(model).lora_dropout["default"] = nn.AlphaDropout(0.5).eval()


def _new_base(model):
    base = layer_of(model).base_layer
    layer_of(model).base_layer = DoubledLinear(16, 12, dtype=torch.float64)
    layer_of(model).base_layer.load_state_dict(base.state_dict())


def _delete(model):
    model.delete_adapter("default")
    model.set_adapter("other")


def _no_casts(model):
    layer_of(model).cast_input_dtype_enabled = False


NOT_FUSED_AFTER = dict(_hooks()) | {
    "disable_adapters": lambda model: model.base_model.disable_adapter_layers(),
    # Without the requires_grad that PEFT sets with it.
    "disabled_alone": lambda model: setattr(layer_of(model), "_disable_adapters", True),
    "merge": lambda model: model.merge_adapter(),
    "two_active": lambda model: model.base_model.set_adapter(["default", "other"]),
    "replaced_forward-base": _replace_forward("base_layer"),
    "replaced_forward-lora_A": _replace_forward("lora_A"),
    "replaced_forward-lora_B": _replace_forward("lora_B"),
    "replaced_forward-dropout": _replace_forward("lora_dropout"),
    "weight_norm": lambda model: parametrizations.weight_norm(layer_of(model).base_layer),
    "parametrization": lambda model: parametrize.register_parametrization(
        layer_of(model).base_layer, "weight", Doubled()
    ),
    "class": _new_class,
    "weight_class": _new_weight_class,
    "base_layer": _new_base,
    "trained_base": lambda model: layer_of(model).base_layer.weight.requires_grad_(True),
    "scaling": _tensor_scaling,
    "bias_of_B": _bias_of_B,
    "dropout": _dropout,
    "casting": _no_casts,
}
FUSED_AFTER = {
    "set_adapter": lambda model: model.set_adapter("other"),
    "delete_adapter": _delete,
    "load_state_dict": lambda model: _set_weight(model, "0", assign=False),
    "load_state_dict-assign": lambda model: _set_weight(model, "0", assign=True),
    "train": lambda model: model.train(),
    "parametrization-of-A": lambda model: parametrize.register_parametrization(
        layer_of(model).lora_A["default"], "weight", Doubled()
    ),
    "scaled": lambda model: layer_of(model).set_scale("default", 3.0),
    "frozen_adapter": lambda model: model.requires_grad_(False),
}
CHANGES = [(name, change, False) for name, change in NOT_FUSED_AFTER.items()]
CHANGES += [(name, change, True) for name, change in FUSED_AFTER.items()]


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize(("change", "fused"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_a_change_is_seen_at_the_next_call(change, fused):
    plain = peft_model()
    patched = copy.deepcopy(plain)
    patch_peft(patched)
    assert call(patched)[1] and layer_of(patched).dora_fusion.remembered is not None
    for model in (plain, patched):
        change(model)
    (expected, _), (found, is_fused) = call(plain), call(patched)
    assert is_fused == fused
    assert relative_error(found, expected) < FP64
    again, _ = call(patched)
    assert torch.equal(again, found)


class Scaled(nn.Linear):
    """Computes x Wᵀ + b as long as its factor is 1."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = 1.0

    def forward(self, x):
        return self.factor * super().forward(x)


def test_a_setting_of_the_base_layers_own_class_is_seen():
    plain = peft_model(Scaled)
    patched = copy.deepcopy(plain)
    patch_peft(patched)
    for factor, fused in ((1.0, True), (2.0, False), (1.0, True)):
        for model in (plain, patched):
            layer_of(model).base_layer.factor = factor
        (expected, _), (found, is_fused) = call(plain), call(patched)
        assert is_fused == fused
        assert relative_error(found, expected) < FP64


def test_to_another_dtype_is_seen():
    plain = peft_model()
    patched = copy.deepcopy(plain)
    patch_peft(patched)
    call(patched)
    for model in (plain, patched):
        layer_of(model).base_layer.to(torch.float32)
    (expected, _), (found, is_fused) = call(plain, X.float()), call(patched, X.float())
    assert is_fused and found.dtype == expected.dtype == torch.float32
    assert relative_error(found, expected.double()) < 1e-5


@pytest.mark.parametrize("name", ["base_layer", "lora_A", "lora_B", "lora_magnitude_vector"])
def test_to_another_device_is_seen(name):
    model = peft_model()
    patch_peft(model)
    call(model)
    inside(layer_of(model), name).to("meta")
    assert eligibility.fused_adapter(layer_of(model)) is None
    assert "meta device" in str(eligibility.why_left_to_peft(layer_of(model))) or name != "base_layer"


def test_pefts_caching_is_seen():
    model = peft_model()
    patch_peft(model)
    call(model)
    with DoraCaching():
        assert not call(model)[1]
    assert call(model)[1]
