"""A patched PEFT model means what the unpatched one means, in everything PEFT lets one do with it."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_kernels.peft import patch_peft, unpatch_peft
from tests.support.peft_models import assert_close, count_fused, dora_config, infer, peft_model, step, trained, twins
from tests.support.tiny_models import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FAMILY = pytest.mark.parametrize("family", FAMILIES)
LAYERS = {"llama": 14, "gpt2": 8, "bert": 14, "t5": 32}


@FAMILY
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_outputs_and_every_gradient(family, impl):
    plain, patched = twins(family)
    report = patch_peft(patched, impl=impl)
    assert len(report.fused) == LAYERS[family]
    with count_fused() as calls:
        assert_close(step(patched), step(plain))
        assert_close(infer(patched.eval()), infer(plain.eval()))
    assert len(calls) == 2 * LAYERS[family]


@FAMILY
def test_patching_changes_no_key_and_unpatching_no_bit(family):
    plain, patched = twins(family)
    before = {name: (id(p), p.requires_grad) for name, p in patched.named_parameters()}
    attributes = {path: set(vars(module)) for path, module in patched.named_modules()}
    expected = step(plain)
    for _ in range(2):
        report = patch_peft(patched)
        assert str(patch_peft(patched)) == str(report), "patching twice is patching once"
        assert {name: (id(p), p.requires_grad) for name, p in patched.named_parameters()} == before
        assert patched.state_dict().keys() == plain.state_dict().keys()
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in patched.state_dict().items())
        unpatch_peft(unpatch_peft(patched))
        assert {path: set(vars(module)) for path, module in patched.named_modules()} == attributes
        assert {type(m) for m in patched.modules()} == {type(m) for m in plain.modules()}
        for name, value in step(patched).items():
            assert torch.equal(value, expected[name]), name


CONFIGS = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5, "layers.0.mlp.up_proj": 1}},
    "some_targets": {"target_modules": ["q_proj", "down_proj"]},
    "dropout": {"lora_dropout": 0.3},
    "modules_to_save": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "rank_above_size": {"r": 70},
    "bias_none_of_llama": {"bias": "all"},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_configs(options):
    plain, patched = twins(**options)
    patch_peft(patched)
    with count_fused() as calls:
        assert_close(step(patched), step(plain))
        assert calls
        assert_close(infer(patched.eval()), infer(plain.eval()))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_trained_base_bias(family, bias):
    plain, patched = twins(family, bias=bias)
    patch_peft(patched)
    gradients = step(patched)
    assert any("base_layer.bias" in name for name in gradients)
    with count_fused() as calls:
        assert_close(step(patched), step(plain))
    assert len(calls) == LAYERS[family]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_dropout_draws_pefts_mask(impl):
    plain, patched = twins("gpt2", lora_dropout=0.5)
    patch_peft(patched, impl=impl)
    assert_close(step(patched, seed=3), step(plain, seed=3))
    different = step(patched, seed=4)["logits"]
    assert not torch.allclose(different, step(patched, seed=3)["logits"]), "it does drop"
    assert_close(step(patched.eval()), step(plain.eval()))


def test_a_copy_unpatches_by_itself():
    patched = peft_model()
    patch_peft(patched)
    twin = copy.deepcopy(patched)
    unpatch_peft(twin)
    for model, fused in ((twin, 0), (patched, 14)):
        with count_fused() as calls:
            infer(model)
        assert len(calls) == fused


def test_modules_stay_what_they_were():
    patched = peft_model()
    patch_peft(patched)
    layer = patched.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, peft.tuners.lora.Linear)
    assert repr(layer).startswith("lora.FusedLinear(\n  (base_layer): Linear(")


def test_unpatched_under_a_wrapper_made_while_patched():
    # accelerate's hooks keep the bound forward they found.
    patched = peft_model(target_modules=["q_proj"])
    patch_peft(patched)
    for module in patched.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.forward = lambda *args, forward=module.forward, **kwargs: forward(*args, **kwargs)
    with count_fused() as calls:
        expected = infer(patched)
        assert len(calls) == 2
        unpatch_peft(patched)
        assert_close(infer(patched), expected)
        assert len(calls) == 2


def test_a_vector_comes_back_as_pefts_one_row():
    for layer in (nn.Linear(6, 5), nn.Linear(6, 5, bias=False)):
        model = peft.get_peft_model(nn.Sequential(layer), dora_config(target_modules=["0"]))
        patch_peft(model)
        fused, left = model(torch.ones(1, 6)), model(torch.ones(6))
        assert left.shape == (1, 5)
        assert torch.allclose(left, fused)


def test_pefts_errors_are_pefts():
    plain, patched = (model.base_model.model.model.layers[0].self_attn.q_proj for model in twins(dtype=torch.float32))
    patch_peft(patched)
    calls = {
        "width": lambda layer: layer(torch.ones(2, 7)),
        "dtype": lambda layer: layer(torch.ones(2, 32, dtype=torch.bfloat16)),
        "mixed_batch": lambda layer: layer(torch.ones(1, 32), adapter_names=["default"]),
    }
    for name, call in calls.items():
        with pytest.raises((RuntimeError, ValueError)) as expected:
            call(plain)
        with pytest.raises(type(expected.value)) as actual:
            call(patched)
        assert str(actual.value) == str(expected.value), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_is_exact_with_dropout(use_reentrant):
    model = peft_model(dtype=torch.bfloat16, lora_dropout=0.3)
    patch_peft(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    gradients = []
    for run in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        torch.manual_seed(0)
        x = torch.randn(5, 32).bfloat16().requires_grad_()
        run(x).sigmoid().sum().backward()
        gradients.append([x.grad] + [p.grad for p in layer.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_compiled_without_a_graph_break():
    plain, patched = twins(target_modules=["q_proj", "down_proj"])
    patch_peft(patched, impl="reference")
    torch._dynamo.reset()
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    actual = {name.removeprefix("_orig_mod."): value for name, value in step(compiled).items()}
    assert_close(actual, step(plain))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
def test_a_trace_records_pefts_own_forward():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4)).double()
    model = trained(peft.get_peft_model(net, dora_config(r=2, target_modules=["0", "2"]))).eval()
    expected = infer_rows(model)
    patch_peft(model)
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.zeros(2, 8, dtype=torch.float64))
    assert_close({"y": infer_rows(traced)}, {"y": expected})
    assert_close({"y": infer_rows(model)}, {"y": expected})


def infer_rows(model):
    """For another number of rows than was traced."""
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(5, 8))
