"""`merge_dora`: the same function without the engine; `unmerge_dora`: the same bits as before."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_kernels.blocks.fuse import fused_blocks
from dora_kernels.config import DoraConfig
from dora_kernels.layers.frozen import frozen_adapters
from dora_kernels.layers.linear import DoraLinear
from dora_kernels.models.apply import apply_dora
from dora_kernels.models.merge import merge_dora, unmerge_dora
from dora_kernels.models.modules import dora_layers
from tests.support.marks import slow
from tests.support.merging import assert_close, trained
from tests.support.tiny_models import FAMILIES, gpt2, llama, logits
from tests.tolerances import MERGED_LOGITS


@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_logits_equal_the_adapters_and_no_engine_module_is_left(family, dtype, rounding):
    base = FAMILIES[family](dtype)
    classes = {name: type(module) for name, module in base.named_modules()}
    keys, before = list(base.state_dict()), logits(base)
    model = trained(base, rounding=rounding, modules_to_save=[])  # an adapter on a classifier's head, too
    expected = logits(model)
    # The adapter says something that the tolerance would not hide.
    assert (expected - before).abs().max() > 5 * MERGED_LOGITS[dtype] * expected.abs().max()
    assert merge_dora(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert list(model.state_dict()) == keys
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(module.training for module in model.modules())
    assert not hasattr(model, "dora_config")
    assert_close(logits(model), expected, dtype)


def test_the_merged_weight_is_the_fp64_one_rounded_once():
    model = trained(llama(dtype=torch.bfloat16), target_modules=["q_proj"], rounding="nearest")
    path, layer = next(iter(dora_layers(model).items()))
    weight, a, b, m = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude))
    adapted = weight + layer.scaling * b @ a
    exact = m[:, None] / adapted.norm(dim=1, keepdim=True) * adapted
    merged = model_weight(merge_dora(model), path).double()
    # Half a bf16 ulp is at most 2⁻⁸ of the value's binade; the fp32 arithmetic before it adds next to nothing.
    assert ((merged - exact).abs() <= 2.0**-8 * 1.001 * exact.abs()).all()


def model_weight(model, path):
    return model.get_submodule(path).weight.detach()


def test_gpt2_stays_conv1d():
    model = merge_dora(trained(gpt2(), target_modules=["c_attn"]))
    layer = model.transformer.h[0].attn.c_attn
    assert type(layer) is Conv1D
    assert layer.weight.shape == (32, 96)
    assert layer.weight.is_contiguous()


def test_modules_to_save_keep_their_training():
    model = trained(llama(), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    expected, weight = logits(model), model.lm_head.weight
    merge_dora(model)
    assert model.lm_head.weight is weight
    assert_close(logits(model), expected, torch.float32)


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16, slow(torch.float16)], ids=str)
def test_a_hundred_cycles_change_no_bit(dtype):
    model = trained(llama(dtype=dtype, layers=1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = copy.deepcopy(model.dora_config)
    for _ in range(100):
        merge_dora(model, keep_base=True)
        unmerge_dora(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad == name.endswith(("lora_A", "lora_B", "magnitude")), name
    assert model.dora_config == config


def test_kept_layers_are_not_part_of_the_merged_model():
    model = merge_dora(trained(llama()), keep_base=True)
    assert not any(isinstance(module, DoraLinear) for module in model.modules())
    assert not any("lora" in name or "magnitude" in name for name in model.state_dict())


def test_unmerge_takes_on_the_mode_of_the_merged_model():
    model = trained(llama().train())
    merge_dora(model, keep_base=True).eval()
    assert not any(module.training for module in unmerge_dora(model).modules())


def test_merging_twice_is_refused():
    model = merge_dora(trained(llama()))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="merged already; call apply_dora"):
        merge_dora(model)
    with pytest.raises(ValueError, match="keep_base=True"):
        unmerge_dora(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    model = merge_dora(trained(llama()), keep_base=True)
    with pytest.raises(ValueError, match="unmerge_dora takes the merge back"):
        merge_dora(model)
    with pytest.raises(ValueError, match="merged with keep_base=True"):
        apply_dora(model, DoraConfig())
    unmerge_dora(model)
    with pytest.raises(ValueError, match="nothing to unmerge"):
        unmerge_dora(model)


def test_a_base_for_dense_weights_is_an_error():
    model = trained(llama())
    with pytest.raises(ValueError, match="merge without base='dequantized'"):
        merge_dora(model, base="dequantized")
    assert dora_layers(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["lora_A", "lora_B", "magnitude"])
def test_a_diverged_adapter_is_not_merged(name, value):
    model = trained(llama())
    path, layer = list(dora_layers(model).items())[-1]
    with torch.no_grad():
        getattr(layer, name).view(-1)[-1] = value
    count = len(dora_layers(model))
    with pytest.raises(ValueError, match=f"{path}.{name} holds NaN or infinity"):
        merge_dora(model)
    assert len(dora_layers(model)) == count


def test_zero_rows_merge_to_finite_weights():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[3:5] = 0
    apply_dora(model, DoraConfig(target_modules=["o_proj"]))
    expected = logits(model)
    merge_dora(model)
    assert torch.equal(model.model.layers[0].self_attn.o_proj.weight[3:5], torch.zeros(2, 32))
    assert_close(logits(model), expected, torch.float32)


def test_layers_put_in_by_hand_merge_too():
    model = nn.Sequential(DoraLinear.from_linear(nn.Linear(5, 7), r=2, lora_alpha=4), nn.ReLU())
    x = torch.randn(3, 5)
    expected = model(x)
    merge_dora(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_what_rounding_costs_is_said_layer_by_layer(caplog):
    """As a share of the update, held against fp64; where it is more than the update, a warning says what to do."""
    model = trained(llama(dtype=torch.bfloat16, layers=1), target_modules=["q_proj", "v_proj"])
    layers = dora_layers(model)
    v_proj = layers["model.layers.0.self_attn.v_proj"]
    with torch.no_grad():
        v_proj.lora_B.zero_()
        v_proj.magnitude.copy_(1.00001 * v_proj.weight_norm()[0])
    exact, base = {}, {}
    for path, layer in layers.items():
        base[path], a, b, m = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude))
        adapted = base[path] + layer.scaling * b @ a
        exact[path] = m[:, None] / adapted.norm(dim=1, keepdim=True) * adapted
    with caplog.at_level(logging.INFO, "dora_kernels.models.merge"):
        merge_dora(model)
    said = {record.args[0]: record.args[2] for record in caplog.records if record.levelno == logging.INFO}
    assert said.keys() == exact.keys()
    for path, share in said.items():
        cost = (model_weight(model, path).double() - exact[path]).norm() / (exact[path] - base[path]).norm()
        assert share == pytest.approx(cost.item(), rel=1e-2), path
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "costs more than the whole update in 1 of 2 layers" in warning and "v_proj" in warning


def test_a_failure_half_way_puts_kept_layers_back(monkeypatch):
    """Memory may run out at any layer: the model is then what it was, and can be merged and unmerged again."""
    model = trained(llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    to_plain, calls, blocks = DoraLinear.to_plain, [], fused_blocks(model).keys()

    def second_fails(layer, *args, **kwargs):
        calls.append(layer)
        # When all layers of an MLP are merged.
        if len(calls) == 8:
            raise torch.OutOfMemoryError("no")
        return to_plain(layer, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(DoraLinear, "to_plain", second_fails)
        with pytest.raises(torch.OutOfMemoryError):
            merge_dora(model, keep_base=True)
    assert not hasattr(model, "dora_unmerged")
    assert fused_blocks(model).keys() == blocks
    unmerged = unmerge_dora(merge_dora(model, keep_base=True)).state_dict()
    assert unmerged.keys() == before.keys() and all(torch.equal(unmerged[name], before[name]) for name in before)


def test_merging_inside_frozen_adapters_is_refused():
    model = trained(llama())
    refused = pytest.raises(RuntimeError, match="cannot merge inside frozen_adapters")
    with torch.no_grad(), frozen_adapters(model.eval()), refused:
        merge_dora(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merge_in_another_dtype_rounds_once_and_casts_the_rest(family):
    model = trained(FAMILIES[family](torch.float32), rounding="nearest")
    exact = {path: layer.merged_weight(torch.float32) for path, layer in dora_layers(model).items()}
    others = {name: p for name, p in model.state_dict().items() if "lora" not in name and "magnitude" not in name}
    others = {name: p.clone() for name, p in others.items() if name.removesuffix(".weight") not in exact}
    merged = merge_dora(model, dtype=torch.bfloat16)
    assert merged.config.dtype == torch.bfloat16 and {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    for path, weight in exact.items():
        found = model_weight(merged, path)
        assert torch.equal(found.T if isinstance(merged.get_submodule(path), Conv1D) else found, weight.bfloat16())
    after = merged.state_dict()
    assert all(torch.equal(after[name], p.bfloat16() if p.is_floating_point() else p) for name, p in others.items())
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == merged.config.tie_word_embeddings
    assert torch.isfinite(logits(merged)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, "float of 16 bits or more"),
        ({"dtype": torch.float8_e4m3fn}, "float of 16 bits or more"),
        ({"dtype": "bf16"}, "float of 16 bits or more"),
        ({"dtype": torch.bfloat16, "keep_base": True}, "merge without keep_base"),
        ({"dtype": torch.bfloat16, "base": "requantized"}, "merge without dtype"),
    ],
)
def test_a_dtype_that_cannot_be_kept_to_is_refused(options, message):
    model = trained(llama(), target_modules=["q_proj"])
    with pytest.raises(ValueError, match=message):
        merge_dora(model, **options)
    assert dora_layers(model)
