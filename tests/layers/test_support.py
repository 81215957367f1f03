"""What models do with a linear layer besides calling it: an adapter there is refused, or left to PEFT, and why."""

import sys
from importlib.util import find_spec
from unittest.mock import patch

import peft
import pytest
import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from transformers import Mamba2Config, WavLMConfig, WavLMModel
from transformers.models.llama import modeling_llama

import dora_kernels as dk
from dora_kernels.layers import adapting
from dora_kernels.layers.support import why_not, why_not_called
from dora_kernels.peft import eligibility
from tests.support.tiny_models import llama

needs_liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")


def test_fused_inference_of_an_encoder_layer():
    """Its fast path reads `linear1.weight`: in eval the adapter would vanish."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(ValueError, match=r"0.linear1 \(Linear\) is not always called: TransformerEncoderLayer"):
        dk.apply_dora(model, dk.DoraConfig(r=2, target_modules=["linear1", "linear2"]))


def test_attention_that_takes_weights():
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = WavLMModel(config)
    with pytest.raises(ValueError, match=r"attention.q_proj \(Linear\) is not always called: .*multi_head"):
        dk.apply_dora(model, dk.DoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    dk.apply_dora(model, dk.DoraConfig(r=2, target_modules=["intermediate_dense"]))


def test_only_the_layers_that_are_not_called():
    """Mamba 2's fused kernel multiplies by out_proj's weight alone."""
    model = nn.Module()
    model.config, model.mixer = Mamba2Config(), nn.Module()
    assert "mamba2" in why_not_called(model, "mixer.out_proj")
    assert why_not_called(model, "mixer.in_proj") is None and why_not_called(model, "mixer.dt_proj") is None


def with_liger_mlp(model):
    from liger_kernel.transformers import LigerSwiGLUMLP

    for layer in model.model.layers:
        layer.mlp.forward = LigerSwiGLUMLP.forward.__get__(layer.mlp)
    return model


@needs_liger
def test_liger_swiglu_is_refused_where_it_would_do_harm():
    model = with_liger_mlp(llama())
    with pytest.raises(ValueError, match=r"mlp.gate_proj \(Linear\) is overwritten by Liger's SwiGLU"):
        dk.apply_dora(model, dk.DoraConfig(r=2, target_modules=["gate_proj", "down_proj"]))
    # Its own output is read by nobody of Liger's.
    dk.apply_dora(model, dk.DoraConfig(r=2, target_modules=["down_proj", "q_proj"]))


@needs_liger
def test_liger_rope_is_refused_where_it_would_do_harm(monkeypatch):
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    monkeypatch.setattr(sys.modules[modeling_llama.__name__], "apply_rotary_pos_emb", liger_rotary_pos_emb)
    with pytest.raises(ValueError, match=r"k_proj \(Linear\) is overwritten by Liger's rotary embedding"):
        dk.apply_dora(llama(), dk.DoraConfig(r=2, target_modules=["k_proj"]))
    dk.apply_dora(llama(), dk.DoraConfig(r=2, target_modules=["v_proj", "gate_proj"]))


@needs_liger
def test_a_patched_model_leaves_them_to_peft():
    config = peft.LoraConfig(use_dora=True, r=2, target_modules=["gate_proj", "down_proj"])
    report = dk.patch_peft(peft.get_peft_model(with_liger_mlp(llama()), config))
    assert {path.rpartition(".")[2] for path in report.fused} == {"down_proj"}
    assert all("Liger's SwiGLU" in reason for reason in report.skipped.values())


def test_a_scaling_that_is_a_tensor_is_left_to_peft():
    """PEFT's preparation for hotswapping under torch.compile makes one of it, for a kernel it would be a pointer."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(use_dora=True, r=2, target_modules=["q_proj"]))
    prepare_model_for_compiled_hotswap(model)
    with pytest.warns(UserWarning, match="patch_peft fuses no layer"):
        report = dk.patch_peft(model, impl="triton")
    assert all("scaling is a tensor" in reason for reason in report.skipped.values())
    ids = torch.arange(6)[None]
    assert model(input_ids=ids).logits.isfinite().all()


def _with_hook(linear):
    linear.register_forward_hook(lambda *_: None)


def _with_integers(linear):
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


def _with_forward(linear):
    linear.forward = lambda x: x


# What a layer that is kept below PEFT's and one that is replaced have in common.
REASONS = {
    "hook": (_with_hook, "has hooks"),
    "integers": (_with_integers, "dtype torch.int8, of no quantisation known here"),
    "forward": (_with_forward, "had its forward replaced"),
    "parametrization": (torch.nn.utils.parametrizations.weight_norm, "computes its weight"),
}


@pytest.mark.parametrize("kept", [False, True], ids=["replaced", "kept"])
@pytest.mark.parametrize(("change", "reason"), REASONS.values(), ids=REASONS)
def test_a_reason_holds_for_our_layers_and_pefts(change, reason, kept):
    linear = nn.Linear(4, 4).requires_grad_(False)
    assert why_not(linear, kept=kept) is None
    change(linear)
    assert reason in why_not(linear, kept=kept)


def test_what_only_a_kept_layer_may_and_may_not():
    trained, view = nn.Linear(4, 4), nn.Linear(4, 4)
    assert why_not(trained) is None and "is trained" in why_not(trained, kept=True)
    # apply_dora refuses such a model as a whole; its layers alone are replaced as well as any, to plan without memory.
    absent = nn.Linear(4, 4, device="meta")
    assert why_not(absent) is None and "on the meta device or offloaded: load it first" in why_not(absent, kept=True)
    # FSDP's view of its flat parameter.
    view._parameters["weight"] = torch.zeros(4, 4)
    assert "type Tensor" in why_not(view) and why_not(view, kept=True) is None


def test_each_layer_is_asked_once():
    with patch.object(adapting, "why_not", wraps=why_not) as asked:
        dk.apply_dora(llama(), dk.DoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    assert asked.call_count == 4
    model = peft.get_peft_model(llama(), peft.LoraConfig(use_dora=True, r=2, target_modules=["q_proj", "up_proj"]))
    with patch.object(eligibility, "why_not", wraps=why_not) as asked:
        dk.patch_peft(model)
    assert asked.call_count == 4


def test_a_scope_leaves_overwritten_layers_to_peft():
    """By a stand-in of Liger's MLP, which is known by its module."""
    model = llama()
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, forward=layer.mlp.forward: forward(x)
        layer.mlp.forward.__module__ = "liger_kernel.stand_in"
    config = peft.LoraConfig(use_dora=True, r=2, target_modules=["gate_proj", "down_proj"])
    with dk.patched_peft():
        model = peft.get_peft_model(model, config)
        fused = [path.rpartition(".")[2] for path, module in model.named_modules() if hasattr(module, "dora_fusion")]
    assert fused == ["down_proj"] * 2
