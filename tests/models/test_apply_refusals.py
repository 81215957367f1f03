"""What `apply_dora` refuses, and that the model is then as it was."""

import accelerate
import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import MambaConfig, MambaForCausalLM

import dora_kernels as dk
from dora_kernels.config import DoraConfig
from dora_kernels.layers.linear import DoraLinear
from dora_kernels.models.apply import apply_dora
from tests.support.nf4 import linear_4bit
from tests.support.sharded import SHARDS
from tests.support.tiny_models import VOCAB, assert_unchanged, bert, gpt2, llama, snapshot


def with_norm():
    return llama(), {"target_modules": ["q_proj", "input_layernorm"]}


def with_container():
    return llama(), {"target_modules": r".*self_attn.*"}


def with_parametrization():
    model = llama()
    parametrizations.weight_norm(model.lm_head)
    return model, {"target_modules": ["lm_head", "q_proj"]}


def with_integers():
    model = llama()
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 32, dtype=torch.int8), requires_grad=False)
    return model, {"target_modules": ["lm_head", "q_proj"]}


def with_a_tensor_subclass():
    class GgufParameter(nn.Parameter):
        pass

    model = llama()
    model.lm_head.weight = GgufParameter(torch.zeros(VOCAB, 32), requires_grad=False)
    return model, {"target_modules": ["lm_head", "q_proj"]}


def with_a_shard():
    model = llama()
    model.lm_head.weight = nn.Parameter(torch.zeros(0))
    return model, {"target_modules": ["lm_head", "q_proj"]}


def with_attention_module():
    return nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)), {"target_modules": ["0", "out_proj"]}


def with_own_forward():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    return nn.Sequential(nn.Linear(8, 8), Scaled(8, 8)), {"target_modules": ["0", "1"]}


def with_replaced_forward():
    model = llama()
    model.lm_head.forward = lambda x: x
    return model, {"target_modules": ["lm_head"]}


def with_hook():
    model = llama()
    model.lm_head.register_forward_hook(lambda module, inputs, output: None)
    return model, {"target_modules": ["lm_head"]}


def with_shared_module():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model.append(model[0])
    return model, {"target_modules": "all-linear"}


def with_mamba():
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    return MambaForCausalLM(config), {"target_modules": ["in_proj", "x_proj", "dt_proj", "out_proj"]}


def with_dora():
    return apply_dora(llama(), DoraConfig(target_modules=["q_proj"])), {"target_modules": ["v_proj"]}


def with_peft():
    return peft.get_peft_model(llama(), peft.LoraConfig(use_dora=True, target_modules=["q_proj"])), {}


def with_peft_inside():
    model = llama()
    peft.inject_adapter_in_model(peft.LoraConfig(use_dora=True, target_modules=["q_proj"]), model)
    return model, {}


def with_compilation():
    return torch.compile(llama()), {}


def with_meta():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, 8)), {}


def with_cpu_offload():
    return accelerate.cpu_offload(llama(), execution_device="cpu"), {}


def with_absent_module_to_save():
    return llama(), {"modules_to_save": ["classifier"]}


def with_module_list_to_save():
    return llama(), {"target_modules": ["lm_head"], "modules_to_save": ["layers"]}


def with_target_inside_saved():
    # PEFT's two rules differ: a module to save may match without a dot, a target is kept off it only with one.
    return llama(), {"target_modules": ["lm_head"], "modules_to_save": ["head"]}


def with_a_packed_head():
    model = bert()
    model.classifier = linear_4bit(model.classifier.weight)
    return model, {}


def with_merge_aware_in_fp16():
    return llama().half(), {"merge_aware": True}


def with_merge_aware_over_nf4_in_fp16():
    linear = linear_4bit(torch.randn(64, 64), compute_dtype=torch.float16)
    return nn.Sequential(nn.Linear(8, 64), linear), {"merge_aware": True}


def with_a_rank_of_no_target():
    return llama(), {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2, "qproj": 4}}


def with_an_alpha_of_a_layer_that_is_left_out():
    return llama(), {"exclude_modules": ["v_proj"], "alpha_pattern": {r".*\.v_proj": 4}}


def with_nothing():
    return llama(), {"target_modules": ["nope"]}


REFUSALS = {
    with_norm: (ValueError, r"input_layernorm \(LlamaRMSNorm\) is no linear layer, convolution or embedding"),
    with_container: (ValueError, r"self_attn \(LlamaAttention\) is no linear layer, convolution or embedding"),
    with_parametrization: (ValueError, "computes its weight"),
    with_integers: (ValueError, "dtype torch.int8, of no quantisation known here"),
    with_a_tensor_subclass: (ValueError, "weight of type GgufParameter: sharded weights and unknown formats"),
    with_a_shard: (ValueError, r"shape \[0\]: gather a sharded weight first"),
    with_attention_module: (ValueError, r"out_proj \(NonDynamicallyQuantizableLinear\) is not always called"),
    with_own_forward: (ValueError, r"1 \(Scaled\) has a forward of its own"),
    with_replaced_forward: (ValueError, "had its forward replaced"),
    with_hook: (ValueError, "register them after apply_dora"),
    with_shared_module: (ValueError, r"0 \(Linear\) is used in several places"),
    with_mamba: (ValueError, r"dt_proj \(Linear\) is not always called: mamba's.*out_proj.*x_proj"),
    with_dora: (ValueError, "has DoRA layers already .*q_proj"),
    with_peft: (ValueError, "patch_peft"),
    with_peft_inside: (ValueError, "patch_peft"),
    with_compilation: (ValueError, "pass model._orig_mod"),
    with_meta: (ValueError, "0.weight is on the meta device"),
    with_cpu_offload: (ValueError, "offloaded by accelerate"),
    with_absent_module_to_save: (ValueError, r"modules_to_save \['classifier'\] not found"),
    with_module_list_to_save: (TypeError, "it is a ModuleList"),
    with_target_inside_saved: (ValueError, "modules_to_save lm_head holds the target lm_head"),
    with_a_packed_head: (ValueError, "modules_to_save classifier is quantised, and cannot be trained in full"),
    with_merge_aware_in_fp16: (ValueError, r"in fp16, .*0.mlp.down_proj \(Linear\), .* load the base in bf16"),
    with_merge_aware_over_nf4_in_fp16: (ValueError, r"merge_aware cannot train .* in fp16, [^\(]*: 1 \(Linear4bit\);"),
    with_a_rank_of_no_target: (ValueError, r"`rank_pattern` \['qproj'\] matches no layer that is adapted"),
    with_an_alpha_of_a_layer_that_is_left_out: (ValueError, "`alpha_pattern` .*v_proj'.* matches no layer that is"),
    with_nothing: (ValueError, "not found in the base model"),
}


@pytest.mark.parametrize("make", REFUSALS, ids=lambda make: make.__name__)
def test_refused_and_unchanged(make):
    model, fields = make()
    before = snapshot(model)
    error, message = REFUSALS[make]
    with pytest.raises(error, match=message):
        apply_dora(model, DoraConfig(**fields))
    assert_unchanged(model, before)


def test_an_error_while_building_leaves_the_model_unchanged(monkeypatch):
    model = llama()
    before, built, build = snapshot(model), [], DoraLinear.from_linear

    def fails_at_the_third(*args, **options):
        built.append(args)
        if len(built) == 3:
            raise RuntimeError("out of memory")
        return build(*args, **options)

    monkeypatch.setattr(DoraLinear, "from_linear", fails_at_the_third)
    with pytest.raises(RuntimeError, match="out of memory"):
        apply_dora(model, DoraConfig())
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [("gpt2", DoraConfig(), "torch.nn.Module, got str"), (nn.ReLU(), {"r": 4}, "DoraConfig, got dict")],
    ids=["model", "config"],
)
def test_wrong_types(model, config, message):
    with pytest.raises(TypeError, match=message):
        apply_dora(model, config)


def test_a_field_set_wrongly_after_construction_is_caught():
    config = DoraConfig()
    config.r = 0
    model = gpt2()
    before = snapshot(model)
    with pytest.raises(ValueError, match="positive integer"):
        apply_dora(model, config)
    assert_unchanged(model, before)


@pytest.mark.parametrize("shard", SHARDS, ids=lambda shard: shard.__name__)
def test_a_sharded_model_is_refused(shard, tmp_path):
    """FSDP2's DTensors and ZeRO-3's empty parameters: nothing is computed, merged or saved from a part."""
    with shard() as of:
        model = llama()
        model.lm_head.weight = of(model.lm_head.weight)
        with pytest.raises(ValueError, match=r"lm_head.weight is (a DTensor|ZeRO-3's part of \[61, 32\]).*gather it"):
            apply_dora(model, DoraConfig(target_modules=["q_proj"]))

        model = apply_dora(llama(), DoraConfig(target_modules=["q_proj"])).eval()
        layer = model.model.layers[0].self_attn.q_proj
        layer.lora_B = of(layer.lora_B)
        calls = (
            dk.merge_dora,
            lambda model: dk.save_adapter(model, tmp_path),
            lambda model: dk.load_adapter(model, "."),
        )
        for call in calls:
            with pytest.raises(
                ValueError, match=r"q_proj.lora_B(.weight)? is (a DTensor|ZeRO-3's part of \[32, 16\]).*gather it"
            ):
                call(model)
        layer.weight = of(layer.weight)
        with pytest.raises(ValueError, match=r"the weight is .*gather it"), dk.frozen_adapters(model):
            pass
    assert not any(tmp_path.iterdir())
