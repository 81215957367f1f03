"""Stacks of experts that are refused, and models whose experts stay frozen."""

import warnings

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

import dora_kernels as dk
from tests.models.test_experts import config
from tests.support.fp8_experts import fp8_experts
from tests.support.tiny_experts import tiny_experts

REFUSED = {
    "dropout": ({"lora_dropout": 0.1}, "`lora_dropout` should be 0"),
    "no rank left": ({"r": 1, "expert_rank": "active"}, "`r` should be at least.*r=1.*num_experts_per_tok=2"),
    "no such": ({"target_parameters": ["experts.w1"]}, r"\['experts.w1'\] not found.*layers.0.mlp.experts.down_proj"),
    "no stack": ({"target_parameters": ["q_proj.weight"]}, "only stacks of experts"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_adapted_is_refused(options, message):
    model = tiny_experts("Mixtral")
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        dk.apply_dora(model, config(**options))
    assert [p.requires_grad for p in model.parameters()] == before
    with pytest.raises(ValueError, match="`target_modules` should name at least one"):
        dk.DoraConfig(target_modules=[])


def test_llama_4_is_refused_by_name():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2}
    model = Llama4ForCausalLM(Llama4TextConfig(vocab_size=61, **sizes, **heads, interleave_moe_layer_step=1))
    reason = "Llama4TextExperts, which transformers does not compute through its registry"
    with pytest.raises(ValueError, match=reason):
        dk.apply_dora(model, config())
    with pytest.warns(UserWarning, match=f"adapts no expert.*{reason}"):
        dk.apply_dora(model, dk.DoraConfig(r=2, exclude_modules=["router"]))


def test_a_quantised_stack_is_refused_by_name():
    model = tiny_experts("Mixtral", torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj is quantised \(Parameter of torch.float8"):
        dk.apply_dora(model, config())


def test_all_linear_says_how_experts_are_adapted():
    with pytest.warns(UserWarning, match=r"target_parameters=\['mlp.experts.down_proj', 'mlp.experts.gate_up_proj'\]"):
        dk.apply_dora(tiny_experts("Mixtral"), dk.DoraConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dk.apply_dora(tiny_experts("Mixtral"), config(target_modules="all-linear"))


def quantised_by_bitsandbytes(model):
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    for layer in model.model.layers:
        parametrize.replace_parameter_4bit(layer.mlp.experts, "down_proj", quant_type="nf4")
    return model


def in_mxfp4(packed):
    """gpt-oss as transformers sets it up to be loaded, and as it is once its stacks lie in the kernels' own objects."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    model = tiny_experts("gpt-oss", torch.bfloat16)
    for layer in model.model.layers:
        experts = layer.mlp.experts = mxfp4.Mxfp4GptOssExperts(model.config)
        for name in ("gate_up_proj", "down_proj") if packed else ():
            delattr(experts, name)
            setattr(experts, name, object())
    return model


def in_fp4():
    model = fp8_experts(dtype=torch.bfloat16)
    for layer in model.model.layers:
        codes = torch.zeros(4, 16, 6, dtype=torch.int8)
        layer.mlp.experts.down_proj = torch.nn.Parameter(codes, requires_grad=False)
    return model


def with_scales(shape):
    model = fp8_experts()
    scales = torch.nn.Parameter(torch.ones(shape), requires_grad=False)
    model.model.layers[0].mlp.experts.down_proj_scale_inv = scales
    return model


def cast():
    return fp8_experts().to(torch.bfloat16)


DEQUANTIZE = r"load the model with quantization_config=Mxfp4Config\(dequantize=True\)"
QUANTISED = {
    "NF4": (
        lambda: quantised_by_bitsandbytes(tiny_experts("Mixtral", torch.bfloat16)),
        r"no parameter but computed.*in 16 bits",
    ),
    "MXFP4, to be loaded": (lambda: in_mxfp4(False), rf"torch.uint8 in Mxfp4GptOssExperts\): {DEQUANTIZE}"),
    "MXFP4, loaded": (lambda: in_mxfp4(True), rf"packed in Mxfp4GptOssExperts: {DEQUANTIZE}"),
    "FP4": (in_fp4, r"holds torch.int8 in FP8Experts: only torch.float8_e4m3fn is read; load the experts in 16 bits"),
    "cast": (cast, r"was cast to torch.bfloat16 in FP8Experts, without its scales: load the model again"),
    "other scales": (lambda: with_scales((4, 1, 3)), r"has scales \[1, 3\] of each.*blocks of \(8, 4\) have \[2, 3\]"),
}


@pytest.mark.parametrize(("build", "message"), QUANTISED.values(), ids=QUANTISED)
def test_stacks_in_formats_that_are_not_decoded_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=rf"experts.down_proj .*{message}"):
        dk.apply_dora(build(), config(target_parameters=["experts.down_proj"]))
