"""PEFT's embeddings and convolutions, fused: their values, their files and calls, and what stays with PEFT and why."""

import copy

import peft
import pytest
import torch
from torch import nn

import dora_kernels as dk
from dora_kernels.peft import conv as peft_conv
from dora_kernels.peft import embedding as peft_embedding
from tests.support import conv as convolution
from tests.support import embedding
from tests.support.images import TARGETS, batch, image_model, trained
from tests.support.oracle import errors, relative_error
from tests.tolerances import ORACLE_FP32, ORACLE_FP64, SAME_FP32

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
PREFIX = "base_model.model."
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
BARS = {torch.float64: ORACLE_FP64, torch.float32: ORACLE_FP32}


@pytest.mark.parametrize("dims", [1, 2, 3], ids=["1d", "2d", "3d"])
@DTYPES
def test_a_convolutions_values_and_gradients(dims, dtype):
    conv = convolution.make_conv(dims, dtype=dtype, stride=2, padding=1)
    problem = convolution.make_problem(conv)
    model = convolution.peft_model(conv, problem)
    expected = convolution.solve_peft(model, problem)
    model.base_model.model.layer.base_layer.bias.requires_grad_(True)
    assert dk.patch_peft(model).fused == [f"{PREFIX}layer"]
    found = errors(convolution.solve_peft(model, problem), expected)
    assert 0 < max(found.values()) <= BARS[dtype], found


@DTYPES
@pytest.mark.parametrize("settings", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
def test_an_embeddings_values_and_gradients(settings, dtype):
    layer = embedding.make_embedding(rows=6, dtype=dtype, **settings)
    problem = embedding.make_problem(layer)
    model = embedding.peft_model(layer, problem)
    expected = embedding.solve_peft(model, problem)
    assert dk.patch_peft(model).fused == [f"{PREFIX}layer"]
    found = errors(embedding.solve_peft(model, problem), expected)
    assert 0 < max(found.values()) <= BARS[dtype], found


def peft_model(dtype=torch.float32, moved=True, depthwise=False, **options):
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 8, "target_modules": TARGETS, "use_dora": True} | options)
    model = peft.get_peft_model(image_model(dtype, depthwise=depthwise), config)
    return trained(model) if moved else model


def test_a_fresh_adapter_is_an_exact_no_op_and_gets_its_bits_back():
    """PEFT rounds the norms of a bf16 base; fused they are fp32 until the model is unpatched."""
    model, inputs = peft_model(torch.bfloat16, moved=False).eval(), batch(torch.bfloat16)
    state = copy.deepcopy(model.state_dict())
    for layer in (model.base_model.model.patches, model.base_model.model.head):
        nn.init.zeros_(layer.base_layer.bias)
    with model.disable_adapter(), torch.no_grad():
        expected = model(*inputs)
    assert len(dk.patch_peft(model).fused) == 4
    with torch.no_grad():
        assert torch.equal(model(*inputs), expected)
    dk.unpatch_peft(model)
    for name, value in model.state_dict().items():
        assert "bias" in name or torch.equal(value, state[name]), name
    assert type(model.base_model.model.patches) is peft.tuners.lora.layer.Conv2d


def test_training_steps_are_pefts():
    plain, fused = peft_model(), peft_model()
    dk.patch_peft(fused)
    losses = {}
    for name, model in (("plain", plain), ("fused", fused)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses[name] = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(*batch()).square().mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["fused"] == pytest.approx(losses["plain"], rel=SAME_FP32)
    assert losses["fused"][-1] < losses["fused"][0]
    for (name, parameter), other in zip(plain.named_parameters(), fused.parameters()):
        assert relative_error(other, parameter) <= SAME_FP32, name


@pytest.fixture
def calls(monkeypatch):
    """Grows with each fused call of a convolution or an embedding."""
    found = []
    for module, name in ((peft_conv, "dora_conv"), (peft_embedding, "dora_embedding")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name, **k: found.append(n) or f(*a, **k))
    return found


def _hooked(model):
    model.local.lora_A["default"].register_forward_hook(lambda *_: None)
    model.words.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)


def _trained_base(model):
    model.local.base_layer.weight.requires_grad_(True)
    model.words.base_layer.weight.requires_grad_(True)


def _other_settings(model):
    model.local.base_layer.padding_mode = "circular"
    model.words.base_layer.max_norm = 1e6


def _merged(model):
    model.local.merge()
    model.words.merge()


def _disabled(model):
    model.local.enable_adapters(False)
    model.words.enable_adapters(False)


CHANGES = [_hooked, _trained_base, _other_settings, _merged, _disabled]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_change_is_seen_at_the_next_call(change, calls):
    model = peft_model().eval()
    dk.patch_peft(model)
    model(*batch())
    assert sorted(calls) == ["dora_conv", "dora_conv", "dora_embedding"]
    change(model.base_model.model)
    calls.clear()
    model(*batch())
    assert calls == ["dora_conv"], "that of the patches, which did not change"


LEFT = {
    "depthwise": ({"depthwise": True}, "local", "its base layer (Conv2d) has 8 groups and one lora_A"),
    "dropout": ({"lora_dropout": 0.1}, "local", "trains with dropout, for which a convolution has no merged weight"),
}


@pytest.mark.parametrize(("options", "name", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_left_to_peft_is_named(options, name, reason):
    model = peft_model(**options)
    twin = copy.deepcopy(model)
    report = dk.patch_peft(model)
    assert reason in report.skipped[PREFIX + name] and f"{PREFIX}words" in report.fused
    torch.manual_seed(3)
    found = model(*batch())
    torch.manual_seed(3)
    assert relative_error(found, twin(*batch())) <= SAME_FP32


def test_a_dilated_convolution_is_left_to_peft():
    """PEFT's forward raises there, as its lora_A is not dilated; so does the patched model's."""
    model = peft.get_peft_model(
        nn.Sequential(nn.Conv1d(2, 4, 3, dilation=2)), peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    )
    with pytest.warns(UserWarning, match="fuses no layer"):
        assert "is dilated, and its lora_A is not" in str(dk.patch_peft(model))


def test_merged_weights_and_frozen_adapters():
    model = peft_model().eval()
    dk.patch_peft(model)
    with torch.no_grad():
        expected = model(*batch())
        with dk.frozen_adapters(model):
            assert relative_error(model(*batch()), expected) <= SAME_FP32
        plain = image_model()
        plain.load_state_dict(dict(dk.merged_weights(model)))
        assert relative_error(plain(*batch()), expected) <= SAME_FP32


def test_a_scope_fuses_what_is_built_inside(calls):
    with dk.patched_peft():
        model = peft_model()
        model(*batch())
    assert sorted(calls) == ["dora_conv", "dora_conv", "dora_embedding"]
    model(*batch())
    assert len(calls) == 3
