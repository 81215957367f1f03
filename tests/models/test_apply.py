"""`apply_dora`: an exact no-op at the start, and nothing half-patched after a refusal."""

import copy
import zlib

import accelerate
import pytest
import torch

from dora_kernels.config import DoraConfig
from dora_kernels.layers.linear import DoraLinear
from dora_kernels.models.apply import apply_dora
from dora_kernels.models.modules import dora_layers
from tests.support.tiny_models import FAMILIES, VOCAB, checkpoint_activations, llama, logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_are_patched_and_only_adapters_train(family, dtype):
    model = FAMILIES[family](dtype)
    weights = dict(model.named_parameters())
    before = logits(model)
    assert apply_dora(model, DoraConfig(r=3, lora_alpha=6)) is model
    layers = dora_layers(model)
    assert layers
    heads = ("lm_head", "classifier")
    assert not any(
        type(module).__name__ in ("Linear", "Conv1D") for name, module in model.named_modules() if name not in heads
    )
    for path, layer in layers.items():
        assert layer.weight is weights[f"{path}.weight"]
        assert layer.salt == zlib.crc32(path.encode())
        assert not layer.training
        assert {layer.lora_A.dtype, layer.lora_B.dtype, layer.magnitude.dtype} == {torch.float32}
    trained = {id(p) for layer in layers.values() for p in (layer.lora_A, layer.lora_B, layer.magnitude)}
    trained |= {id(p) for p in model.classifier.parameters()} if family == "bert" else set()
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    if dtype == torch.float32 or not any(layer.bias is not None for layer in layers.values()):
        assert torch.equal(logits(model), before)
    else:
        # z is rounded before the bias is added, where the base layer adds it in fp32: an ulp (2⁻⁸) here and there.
        assert (logits(model) - before).abs().max() <= 2e-2 * before.abs().max()


def test_options_reach_the_layers():
    config = DoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.25,
        target_modules=["q_proj", "v_proj"],
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 9},
        alpha_pattern={"v_proj": 2},
        dropout_mode="peft",
        space="token",
        impl="reference",
        rounding="nearest",
    )
    model = apply_dora(llama(), config)
    layers = dora_layers(model)
    assert [layer.r for layer in layers.values()] == [9, 4, 4, 4]
    assert [layer.scaling for layer in layers.values()] == [8 / 9**0.5, 2 / 2, 8 / 2, 2 / 2]
    for layer in layers.values():
        assert (layer.lora_dropout, layer.dropout_mode) == (0.25, "peft")
        assert (layer.space, layer.impl, layer.rounding) == ("token", "reference", "nearest")
    assert len({layer.salt for layer in layers.values()}) == 4


def test_the_model_remembers_a_config_of_its_own():
    config = DoraConfig(r=4, target_modules=["q_proj"])
    model = apply_dora(llama(), config)
    config.target_modules.append("v_proj")
    config.r = 8
    assert (model.dora_config.r, model.dora_config.target_modules) == (4, ["q_proj"])


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_mode_is_kept(train):
    model = apply_dora(llama().train(train), DoraConfig())
    assert all(module.training is train for module in model.modules())


def test_a_step_moves_every_adapter_and_nothing_else():
    model = apply_dora(llama().train(), DoraConfig(r=2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.arange(12).reshape(2, 6) % VOCAB
    for _ in range(2):  # A's gradient is zero while B is
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == name.endswith(("lora_A", "lora_B", "magnitude")), name


@pytest.mark.parametrize("first", ["checkpointing", "dora"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing_gives_the_same_gradients(reentrant, first):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = llama().train()
        if checkpointing and first == "checkpointing":
            checkpoint_activations(model, use_reentrant=reentrant)
        apply_dora(model, DoraConfig(r=2))
        if checkpointing and first == "dora":
            checkpoint_activations(model, use_reentrant=reentrant)
        tokens = torch.arange(12).reshape(2, 6) % VOCAB
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


def test_modules_to_save_train_in_place_in_their_own_dtype():
    model = llama(dtype=torch.bfloat16)
    head = model.lm_head
    apply_dora(model, DoraConfig(modules_to_save=["lm_head", "model.norm"]))
    assert model.lm_head is head
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "_proj" not in name}
    assert trained == {"lm_head.weight", "model.norm.weight"}
    assert head.weight.dtype == torch.bfloat16


def test_a_tied_module_to_save_trains_a_copy():
    model = llama(tied=True)
    before, embedding = logits(model), model.model.embed_tokens.weight
    with pytest.warns(UserWarning, match="lm_head shared a weight"):
        apply_dora(model, DoraConfig(modules_to_save=["lm_head"]))
    assert model.lm_head.weight is not embedding
    assert torch.equal(model.lm_head.weight, embedding)
    assert (model.lm_head.weight.requires_grad, embedding.requires_grad) == (True, False)
    assert torch.equal(logits(model), before)


def test_a_tied_head_as_a_target_shares_the_frozen_weight():
    model = apply_dora(llama(tied=True), DoraConfig(target_modules=["lm_head"]))
    assert isinstance(model.lm_head, DoraLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_deepcopy_is_independent():
    model = apply_dora(llama(), DoraConfig())
    twin = copy.deepcopy(model)
    path, layer = next(iter(dora_layers(model).items()))
    with torch.no_grad():
        layer.magnitude.zero_()
    assert dora_layers(twin)[path].magnitude.abs().sum() > 0
    assert twin.dora_config == model.dora_config


def test_a_device_map_without_offload_keeps_its_hooks():
    model = accelerate.dispatch_model(llama(), {"": "cpu"}, force_hooks=True)
    before, hooked = logits(model), {name for name, m in model.named_modules() if hasattr(m, "_hf_hook")}
    apply_dora(model, DoraConfig())
    assert {name for name, m in model.named_modules() if hasattr(m, "_hf_hook")} == hooked
    assert all(layer.weight.grad_fn is None and not layer.weight.requires_grad for layer in dora_layers(model).values())
    assert torch.equal(logits(model), before)
