"""What a model does with its linear layers besides calling them, seen on a copy without values."""

import copy
import random

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

import dora_kernels as dk
from dora_kernels.layers import probe as room
from dora_kernels.layers.probe import probe
from dora_kernels.layers.valueless import repeats
from tests.support.nf4 import linear_4bit
from tests.support.tiny_models import FAMILIES, VOCAB, assert_unchanged, llama, snapshot

TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPEECH = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": (8, 8),
    "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_seen_before(monkeypatch):
    monkeypatch.setattr(room, "SEEN", {})


def longcat():
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    sizes = {name: TINY[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "pad_token_id")}
    config = transformers.LongcatFlashConfig(
        **sizes, **latent, head_dim=4, ffn_hidden_size=24, expert_ffn_hidden_size=8, num_layers=1, n_routed_experts=4,
        moe_topk=2, zero_expert_num=1,
    )  # fmt: skip
    return transformers.LongcatFlashForCausalLM(config)


def x_vector():
    config = transformers.Wav2Vec2Config(
        **SPEECH, tdnn_dim=(16, 16), tdnn_kernel=(3, 1), tdnn_dilation=(1, 1), xvector_output_dim=8, vocab_size=VOCAB
    )
    return transformers.Wav2Vec2ForXVector(config)


def wavlm():
    return transformers.WavLMModel(transformers.WavLMConfig(**SPEECH))


def jamba():
    config = transformers.JambaConfig(
        **TINY, num_experts=2, mamba_d_state=4, mamba_d_conv=2, mamba_expand=1, mamba_dt_rank=4,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
    )  # fmt: skip
    return transformers.JambaForCausalLM(config)


def layoutlm():
    sizes = {name: TINY[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size")}
    config = transformers.LayoutLMv3Config(
        **sizes, num_hidden_layers=1, max_2d_position_embeddings=64, coordinate_size=3, shape_size=2, input_size=32,
        rel_pos_bins=8, rel_2d_pos_bins=8, max_rel_pos=16, max_rel_2d_pos=16,
    )  # fmt: skip
    return transformers.LayoutLMv3Model(config)


READS = {
    longcat: ["router.classifier"],
    x_vector: ["tdnn.0.kernel", "tdnn.1.kernel"],
    wavlm: ["q_proj", "k_proj", "v_proj", "out_proj"],
    jamba: ["mamba.conv1d", "mamba.dt_proj"],
    layoutlm: ["rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"],
}


@pytest.mark.parametrize("build", READS, ids=lambda build: build.__name__)
def test_layers_whose_weight_is_read_past_their_forward(build):
    seen = probe(build())
    assert seen.stopped is None
    assert all(any(path.endswith(end) for end in READS[build]) for path in seen.reads), seen.reads
    assert all(any(path.endswith(end) for path in seen.reads) for end in READS[build]), seen.reads


def olmo():
    return transformers.OlmoForCausalLM(transformers.OlmoConfig(**TINY, clip_qkv=1.0))


def llama4():
    config = transformers.Llama4TextConfig(
        **TINY, intermediate_size_mlp=24, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    return transformers.Llama4ForCausalLM(config)


WRITES = {olmo: {"q_proj", "k_proj", "v_proj"}, llama4: {"down_proj"}}


@pytest.mark.parametrize("build", WRITES, ids=lambda build: build.__name__)
def test_layers_whose_output_is_written_over(build):
    seen = probe(build())
    assert seen.stopped is None and not seen.reads
    assert {path.rpartition(".")[2] for path in seen.written} == WRITES[build]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_do_nothing_of_the_kind(family):
    assert probe(FAMILIES[family]())[:3] == ({}, frozenset(), None)


def quantised():
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj = linear_4bit(layer.self_attn.q_proj.weight)
    return model


def bfloat16_experts():
    config = transformers.MixtralConfig(**TINY, num_local_experts=4)
    return transformers.MixtralForCausalLM(config).bfloat16()


def values_that_decide():
    """A number and a selection that depend on values."""
    model = llama()
    forward = model.model.forward

    def deciding(input_ids, **options):
        selected = input_ids[input_ids > 0]
        return None if input_ids.max() > selected.numel() + VOCAB else forward(input_ids, **options)

    model.model.forward = deciding
    return model


def two_inputs():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = {**sizes, "vocab_size": VOCAB}, {**sizes, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize(
    "build",
    [
        two_inputs,
        quantised,
        bfloat16_experts,
        values_that_decide,
        lambda: llama(torch.bfloat16),
        lambda: dk.apply_dora(llama(torch.bfloat16), dk.DoraConfig(r=2)),
        lambda: peft.get_peft_model(llama(), peft.LoraConfig(r=2, use_dora=True)).get_base_model(),
    ],
    ids=["two_inputs", "quantised", "experts", "values", "bf16", "ours", "pefts"],
)
def test_models_that_are_seen_whole(build):
    assert probe(build()).stopped is None


def test_nothing_is_touched():
    model = x_vector().train()  # it draws the masks of its training from numpy
    before, generators = snapshot(model), (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())
    modes = [module.training for module in model.modules()]
    probe(model)
    assert_unchanged(model, before)
    assert modes == [module.training for module in model.modules()]
    assert random.getstate() == generators[0] and (np.random.get_state()[1] == generators[1]).all()
    assert torch.equal(torch.get_rng_state(), generators[2])


def test_what_hangs_on_a_model_is_not_called():
    """A hook may count or collect, and a forward put on the instance, as TRL's, may be the original model's."""
    model, calls = llama(), []
    model.model.layers[0].register_forward_hook(lambda *args: calls.append("hook"))
    model.lm_head.register_forward_pre_hook(lambda *args: calls.append("pre-hook"))
    forward = model.forward
    model.forward = lambda *args, **kwargs: calls.append("forward") or forward(*args, **kwargs)
    room.SEEN.clear()
    assert probe(model).stopped is None and not calls
    model(torch.zeros(1, 2, dtype=torch.long))
    assert calls == ["forward", "hook", "pre-hook"]


def test_a_model_without_weights_will_do():
    with torch.device("meta"):
        model = longcat()
    assert probe(model).reads == probe(longcat()).reads


def test_of_layers_that_repeat_the_first_runs():
    model = llama(layers=4)
    model.model.layers[2].mlp.down_proj.bias = nn.Parameter(torch.zeros(32))
    assert repeats(model) == {"model.layers.1": "model.layers.0", "model.layers.3": "model.layers.0"}


def test_what_was_seen_of_the_first_holds_for_all():
    paths = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkv"}
    assert probe(olmo()).written == paths


def test_a_model_that_was_seen_is_not_run_again(tmp_path, monkeypatch):
    """Nor one from another folder."""
    built, folders = olmo(), (tmp_path / "one", tmp_path / "other")
    for folder in folders:
        built.save_pretrained(folder)
    one, other = (type(built).from_pretrained(folder) for folder in folders)
    first, loaded = probe(olmo()), probe(one)
    monkeypatch.setattr(room, "inputs_of", lambda model: pytest.fail("runs again"))
    assert probe(olmo()) is first and probe(other) is loaded


@pytest.mark.parametrize(
    ("build", "seconds", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), 5.0, "ValueError: inputs for Sequential are not known"),
        (llama, 0.0, "TimeoutError: it takes longer than 0 s"),
    ],
    ids=["inputs", "time"],
)
def test_a_probe_that_stops_says_so_and_explain_too(build, seconds, reason, monkeypatch):
    monkeypatch.setattr(room, "SECONDS", seconds)
    model = build()
    assert probe(model).stopped == reason
    lines = str(dk.explain(dk.apply_dora(model, dk.DoraConfig(r=2)), tokens=3)).splitlines()
    assert f"only the first step will tell layers that are not called: {reason}" in lines[-2:]


def test_explain_has_no_such_line_where_all_is_seen():
    assert dk.explain(dk.apply_dora(llama(), dk.DoraConfig(r=2)), tokens=3).unseen is None


def test_a_named_layer_is_refused_and_all_linear_leaves_it_out():
    with pytest.raises(ValueError, match=r"classifier \(Linear\) is not always called: the model reads its weight"):
        dk.apply_dora(longcat(), dk.DoraConfig(r=2, target_modules=["classifier", "o_proj"]))
    with pytest.warns(UserWarning, match=r"leaves out 7 layers: .*classifier is not always called.*has a name that"):
        model = dk.apply_dora(longcat(), dk.DoraConfig(r=2))
    assert type(model.model.layers[0].mlp.router.classifier) is nn.Linear


@pytest.mark.parametrize("engine", ["ours", "pefts"])
def test_layers_that_are_written_over_know_it_before_the_first_step(engine):
    names = ["q_proj", "o_proj"]
    if engine == "ours":
        model = dk.apply_dora(olmo(), dk.DoraConfig(r=2, target_modules=names, lora_dropout=0.5))
    else:
        model = peft.get_peft_model(olmo(), peft.LoraConfig(r=2, use_dora=True, target_modules=names))
        dk.patch_peft(model)
    layers = {path.rpartition(".")[2]: m for path, m in model.named_modules() if hasattr(m, "plan")}
    known = {name: layer.output_use.is_written for name, layer in layers.items()}
    assert known == {"q_proj": True, "o_proj": False}
    reasons = {e.name.rpartition(".")[2]: e.plan.reason for e in dk.explain(model, tokens=4)}
    assert "writes over its output" in reasons["q_proj"] and "writes over" not in reasons["o_proj"]
    tokens = torch.arange(8)[None]
    model.train()(input_ids=tokens, labels=tokens).loss.backward()


def test_a_copy_of_a_model_is_probed_like_it():
    model = dk.apply_dora(olmo(), dk.DoraConfig(r=2))
    assert probe(copy.deepcopy(model)).written == probe(model).written != frozenset()
