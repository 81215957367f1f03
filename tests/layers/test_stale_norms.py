"""No norm outlives the weights it is of: eighteen ways to change a tensor, nine of which its version counter misses."""

import copy

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.autograd import _unsafe_preserve_version_counter

import dora_kernels as dk
from tests.support.peft_models import dora_config

SIZE = 24
SEEN, MISSED = "seen", "missed"


def _optimizer(cls, **options):
    def step(parameter):
        parameter.requires_grad_()
        parameter.grad = torch.ones_like(parameter)
        cls([parameter], lr=0.1, **options).step()
        parameter.grad = None

    return step


@torch.no_grad()
def _load(parameter):
    nn.ParameterList([parameter]).load_state_dict({"0": parameter.detach() + 0.1})


def _set_data(parameter):
    parameter.data = parameter.data + 0.1


def _numpy(parameter):
    np.add(view := parameter.detach().numpy(), 0.1, out=view)


def _data_in_inference_mode(parameter):
    with torch.inference_mode():
        parameter.data.add_(0.1)


def _counter_preserved(parameter):
    with torch.no_grad(), _unsafe_preserve_version_counter(parameter):
        parameter.add_(0.1)


def _half(parameter):
    # Of the module that holds it: 16 bits and back, which rounds it.
    nn.ParameterList([parameter]).half().float()


def _dlpack(parameter):
    torch.from_dlpack(torch.utils.dlpack.to_dlpack(parameter.detach())).add_(0.1)


# How, and whether the tensor's version counter sees it.
WAYS = {
    "add_": (torch.no_grad()(lambda p: p.add_(0.1)), SEEN),
    "copy_": (torch.no_grad()(lambda p: p.copy_(p + 0.1)), SEEN),
    "assigned_slice": (torch.no_grad()(lambda p: p[:3].__setitem__(slice(None), 0.1)), SEEN),
    "init": (lambda p: nn.init.normal_(p), SEEN),
    "load_state_dict": (_load, SEEN),
    "foreach_add_": (torch.no_grad()(lambda p: torch._foreach_add_([p], 0.1)), SEEN),
    "foreach_adamw": (_optimizer(torch.optim.AdamW, foreach=True), SEEN),
    "plain_adamw": (_optimizer(torch.optim.AdamW, foreach=False), SEEN),
    "plain_sgd": (_optimizer(torch.optim.SGD, foreach=False), SEEN),
    "fused_adamw": (_optimizer(torch.optim.AdamW, fused=True), MISSED),
    "fused_sgd": (_optimizer(torch.optim.SGD, fused=True), MISSED),
    "data_add_": (lambda p: p.data.add_(0.1), MISSED),
    "data_assigned": (_set_data, MISSED),
    "numpy_view": (_numpy, MISSED),
    "data_in_inference_mode": (_data_in_inference_mode, MISSED),
    "counter_preserved": (_counter_preserved, MISSED),
    "half": (_half, MISSED),
    "dlpack": (_dlpack, MISSED),
}


def ours():
    layer = dk.DoraLinear.from_linear(nn.Linear(SIZE, SIZE), r=3, lora_alpha=6).eval()
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer, {"weight": layer.weight, "lora_B": layer.lora_B}


def patched():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(SIZE, SIZE)), dora_config(target_modules=["0"])).eval()
    dk.patch_peft(model)
    layer = model.base_model.model[0]
    lora_B = layer.lora_B["default"].weight
    nn.init.normal_(lora_B, std=0.1)
    return model, {"weight": layer.base_layer.weight, "lora_B": lora_B}


@pytest.mark.parametrize("name", ["weight", "lora_B"])
@pytest.mark.parametrize("make", [ours, patched])
@pytest.mark.parametrize("way", WAYS)
def test_the_next_call_sees_the_change(way, make, name):
    """In training, in inference and on entering `frozen_adapters` again, as a copy that never saw the old values."""
    change, counter = WAYS[way]
    model, parameters = make()
    parameter, x = parameters[name], torch.randn(5, SIZE)
    with torch.no_grad(), dk.frozen_adapters(model):
        before = model(x)
    model(x).sum().backward()
    trains, version = parameter.requires_grad, parameter._version
    change(parameter)
    parameter.requires_grad_(trains)
    if way not in ("data_assigned", "half"):  # these bring a counter of their own
        assert (parameter._version > version) == (counter == SEEN)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        expected = fresh(x)
        assert not torch.allclose(expected, before, rtol=1e-5), "it changes the output"
        assert torch.equal(model(x), expected)
        with dk.frozen_adapters(model):
            assert torch.equal(model(x), expected)
    model.zero_grad()
    for twin in (model, fresh):
        twin(x).sum().backward()
    for (path, one), other in zip(model.named_parameters(), fresh.parameters()):
        assert one.grad is None or torch.equal(one.grad, other.grad), path
