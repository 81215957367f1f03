"""A gated MLP as one function inside a model: its losses and gradients are those of the layers, call by call."""

import copy
import io
import pickle
import tempfile

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config

import dora_kernels as dk
from dora_kernels.blocks import mlp as room
from dora_kernels.blocks.fuse import fused_blocks
from tests.support.marks import slow
from tests.support.nf4 import linear_4bit
from tests.support.peft_models import dora_config, peft_model, step, trained
from tests.support.tiny_models import checkpoint_activations
from tests.tolerances import SAME_FP32

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL),
    "llama-with-biases": LlamaConfig(**SMALL, mlp_bias=True),
    "qwen2": Qwen2Config(**SMALL),
    "gemma": GemmaConfig(**SMALL, head_dim=8),
    "phi3": Phi3Config(**SMALL),
    # Rows of whole blocks of 64: where they are not, bitsandbytes itself decodes wrongly on a CPU.
    "nf4": LlamaConfig(**SMALL | {"hidden_size": 64, "intermediate_size": 128}),
}


@pytest.fixture
def calls(monkeypatch):
    """One entry for each call of `dora_mlp`."""
    made, original = [], room.dora_mlp

    def counted(*args, **options):
        made.append(options)
        return original(*args, **options)

    monkeypatch.setattr(room, "dora_mlp", counted)
    return made


def base(family="llama", dtype=torch.float64):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype)


def adapted(family="llama", dtype=torch.float64, **options):
    """In training mode, its adapters away from their start; the same on every call."""
    model = base(family, dtype)
    torch.manual_seed(1)
    dk.apply_dora(model, dk.DoraConfig(r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, dk.DoraLinear):
                layer.lora_B.normal_(0.0, 0.1)
                layer.magnitude.mul_(1 + 0.1 * torch.randn_like(layer.magnitude))
    return model.train()


def differences(found, expected):
    """The largest difference of each tensor, relative to the expected one's largest number."""
    assert found.keys() == expected.keys()
    return {name: (found[name] - expected[name]).abs().max() / expected[name].abs().max() for name in expected}


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "nf4"])
def test_a_step_is_that_of_the_layers(family, space, calls):
    found = step(adapted(family, space=space))
    assert len(calls) == 2
    expected = step(adapted(family, space=space, fuse_blocks=False))
    assert len(calls) == 2
    assert max(differences(found, expected).values()) <= 1e-11


def losses(model, steps=2):
    """Over steps of an optimizer, on one batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    tokens = torch.arange(18).reshape(2, 9) * 7 % 61
    found = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def quantized(model):
    """With NF4 in the place of the MLPs' weights."""
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, linear_4bit(getattr(layer.mlp, name).weight.detach()))
    return model


@pytest.mark.parametrize("family", [slow("llama"), slow("qwen2"), slow("gemma"), "phi3", "nf4"])
def test_losses_are_those_of_peft(family, calls):
    """The real kernels, interpreted, through `patch_peft` and, from PEFT's files, through `apply_dora`."""

    def made(by):
        model = base(family, torch.float32)
        model = quantized(model) if family == "nf4" else model
        if by == "ours":
            return dk.load_adapter(model, folder).train()
        torch.manual_seed(1)
        return trained(peft.get_peft_model(model, dora_config())).train()

    with tempfile.TemporaryDirectory() as folder:
        made("peft").save_pretrained(folder)
        ours, patched = made("ours"), made("peft")
    for layer in ours.modules():
        if isinstance(layer, dk.DoraLinear):
            # With NF4, what PEFT multiplies by.
            layer.impl, layer.nf4_parity = "triton", True
    report = dk.patch_peft(patched, impl="triton", nf4_parity=True)
    names = ("mlp",) if family == "phi3" else ("mlp", "self_attn")  # phi3's q, k and v are one layer
    paths = [f"base_model.model.model.layers.{i}.{name}" for i in range(2) for name in names]
    assert report.blocks == dict.fromkeys(paths)
    expected = losses(made("peft"))
    assert losses(patched) == pytest.approx(expected, rel=SAME_FP32)
    assert losses(ours) == pytest.approx(expected, rel=SAME_FP32)
    assert len(calls) == 2 * 2 * 2 and {call["impl"] for call in calls} == {"triton"}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, calls):
    model = adapted()
    expected = step(model)
    checkpoint_activations(model, use_reentrant=use_reentrant)
    found = step(model)
    assert len(calls) == 6, "forward, and forward with its recomputation, of two layers"
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_autocast(calls):
    model = adapted(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model)
    assert len(calls) == 2
    # Some rounding of the residual stream to 8 bits in each layer.
    assert max(differences({"logits": found["logits"]}, {"logits": step(model)["logits"]}).values()) < 0.05


def test_dropout_runs_the_layers_alone_in_training(calls):
    patched = peft_model(lora_dropout=0.5)
    dk.patch_peft(patched)
    for model, path in ((adapted(lora_dropout=0.5), ""), (patched, "base_model.model.")):
        step(model)
        assert "gate_proj has dropout" in dk.explain(model, 8).blocks[f"{path}model.layers.0.mlp"]
    assert not calls


def test_inference_runs_the_layers_alone(calls):
    model = adapted().eval()
    expected = adapted(fuse_blocks=False).eval()
    tokens = torch.arange(18).reshape(2, 9)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
        with dk.frozen_adapters(model):
            model(tokens)
    assert not calls
    assert dk.explain(model, 8).blocks["model.layers.0.mlp"] == "its layers run alone in inference"


def test_states_of_peft_that_run_the_layers_alone(calls):
    model = peft_model()
    dk.patch_peft(model)
    tokens = torch.arange(18).reshape(2, 9)
    with model.disable_adapter():
        model(tokens)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    model(tokens)
    model.set_adapter("other")
    assert not calls
    step(model)
    assert len(calls) == 2, "one adapter is active again"
    model.merge_adapter()
    model(tokens)
    assert len(calls) == 2


def test_explain_says_what_runs_inside():
    model = adapted()
    explained = dk.explain(model, tokens=8192)
    assert explained.blocks["model.layers.0.mlp"] == "one function (silu)"
    assert sum("inside model.layers.0.mlp, " in str(layer) for layer in explained) == 3
    assert not dk.explain(adapted(fuse_blocks=False), tokens=8192).blocks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_fused_and_their_own(copied, calls):
    model = adapted()
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert max(differences(step(twin), step(adapted(fuse_blocks=False))).values()) <= 1e-11
    assert len(calls) == 2


def test_a_saved_model_loads():
    model, memory = adapted(), io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    loaded = torch.load(memory, weights_only=False)
    paths = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn", "mlp")]
    assert list(fused_blocks(loaded)) == list(fused_blocks(model)) == paths


def test_names_and_classes_stay():
    model, alone = adapted(), adapted(fuse_blocks=False)
    assert list(model.state_dict()) == list(alone.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in alone.named_modules()]
    assert isinstance(model.model.layers[0].mlp, type(alone.model.layers[0].mlp))


def test_merging_and_unpatching_give_the_class_back(calls):
    model = adapted()
    own = type(base().model.layers[0].mlp)
    dk.merge_dora(model, keep_base=True)
    assert type(model.model.layers[0].mlp) is own and not hasattr(model.model.layers[0].mlp, "dora_block")
    dk.unmerge_dora(model)
    step(model)
    assert len(calls) == 2

    model = peft_model()
    dk.patch_peft(model)
    wrapped = model.base_model.model.model.layers[0].mlp.forward
    dk.unpatch_peft(model)
    assert not fused_blocks(model)
    wrapped(torch.randn(2, 3, 32, dtype=torch.float64))  # a wrapper that was made meanwhile
    dk.patch_peft(model, blocks=False)
    assert not fused_blocks(model)
    assert len(calls) == 2


def test_patching_again_takes_the_blocks_back():
    model = peft_model()
    dk.patch_peft(model)
    assert len(fused_blocks(model)) == 4
    assert not dk.patch_peft(model, blocks=False).blocks and not fused_blocks(model)


@pytest.mark.parametrize("value", [True, "on", None])
def test_options_that_do_not_exist(value):
    with pytest.raises(ValueError, match='`fuse_blocks` should be "auto" or False'):
        dk.DoraConfig(fuse_blocks=value)
    with pytest.raises(ValueError, match='`blocks` should be "auto" or False'):
        dk.patch_peft(peft_model(), blocks=value)
