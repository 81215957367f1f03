"""What PEFT's files hold beside A, B and m: read as PEFT reads it, and written where PEFT would."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import dora_kernels as dk
from tests.support.tiny_models import VOCAB, bert, llama, logits
from tests.tolerances import SAME_FP32

WEIGHTS = "adapter_model.safetensors"
NEW_IDS = torch.tensor([[3, VOCAB, VOCAB + 1, VOCAB + 4]])
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers"),
    pytest.mark.filterwarnings("ignore:modules_to_save"),
    pytest.mark.filterwarnings("ignore:Model .*tied"),
]


def moved(model, also=()):
    """With every trained parameter, and those whose names hold one of `also`, away from their start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or any(part in name for part in also):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


def pefts(base, also=(), **fields):
    return moved(peft.get_peft_model(base, peft.LoraConfig(r=3, use_dora=True, **fields)), also)


def assert_same(actual, expected):
    assert (actual - expected).abs().max() <= SAME_FP32 * expected.abs().max()


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    return tmp_path


def resized(folder, rows=VOCAB + 5, seed=1):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model.resize_token_embeddings(rows)
    return model


def outputs(model, ids=NEW_IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapted_head_with_its_base_layer(tied, tmp_path):
    model = pefts(llama(tied=tied), ["lm_head"], target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    assert any("lm_head.base_layer.weight" in key for key in load_file(tmp_path / WEIGHTS))
    loaded = dk.load_adapter(llama(tied=tied), tmp_path)
    expected = peft.PeftModel.from_pretrained(llama(tied=tied), tmp_path).eval()
    assert torch.equal(loaded.lm_head.weight, expected.base_model.model.lm_head.base_layer.weight)
    assert_same(logits(loaded), logits(expected))


def test_a_resized_vocabulary_that_peft_stored(folder):
    model = pefts(resized(folder), ["embed", "lm_head"], target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.save_pretrained(folder / "adapter")
    loaded = dk.load_adapter(resized(folder, seed=2), folder / "adapter")
    assert_same(outputs(loaded), outputs(model))
    with pytest.raises(ValueError, match=rf"resize_token_embeddings\({VOCAB + 5}\) first"):
        dk.load_adapter(resized(folder, rows=VOCAB), folder / "adapter")


def test_modules_to_save_in_a_resized_model(folder):
    model = pefts(
        resized(folder), ["embed", "lm_head"], target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    model.save_pretrained(folder / "adapter")
    assert any("original_module" in key for key in load_file(folder / "adapter" / WEIGHTS))
    loaded = dk.load_adapter(resized(folder, seed=2), folder / "adapter")
    assert_same(outputs(loaded), outputs(model))
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= trained


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["frozen head", "adapted head"])
def test_we_store_a_resized_vocabulary_as_peft_does(targets, folder):
    model = dk.apply_dora(resized(folder), dk.DoraConfig(r=3, target_modules=targets))
    moved(model, ["embed", "lm_head"])
    dk.save_adapter(model, folder / "adapter")
    assert_same(outputs(dk.load_adapter(resized(folder, seed=2), folder / "adapter")), outputs(model))
    in_peft = peft.PeftModel.from_pretrained(resized(folder, seed=3), folder / "adapter").eval()
    assert_same(outputs(in_peft), outputs(model))


def test_an_unchanged_vocabulary_is_not_stored(folder):
    model = dk.apply_dora(resized(folder, rows=VOCAB), dk.DoraConfig(r=3, target_modules=["q_proj"]))
    dk.save_adapter(model, folder / "adapter")
    assert all(".q_proj." in key for key in load_file(folder / "adapter" / WEIGHTS))


def test_values_of_the_base_that_are_not_finite_are_refused(folder):
    model = pefts(resized(folder), ["embed", "lm_head"], target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.save_pretrained(folder / "adapter")
    tensors = load_file(folder / "adapter" / WEIGHTS)
    tensors["base_model.model.model.embed_tokens.weight"][2, 3] = float("nan")
    save_file(tensors, folder / "adapter" / WEIGHTS, metadata={"format": "pt"})
    untouched = resized(folder)
    before = {name: parameter.clone() for name, parameter in untouched.named_parameters()}
    with pytest.raises(ValueError, match=r"embed_tokens\.weight holds NaN"):
        dk.load_adapter(untouched, folder / "adapter")
    assert all(torch.equal(parameter, before[name]) for name, parameter in untouched.named_parameters())


def test_layers_to_transform(tmp_path):
    model = pefts(llama(), target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers")
    model.save_pretrained(tmp_path)
    loaded = dk.load_adapter(llama(), tmp_path)
    paths = {path for path, module in loaded.named_modules() if isinstance(module, dk.DoraLinear)}
    assert paths == {f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj")}
    assert_same(logits(loaded), logits(model))
    dk.save_adapter(loaded, tmp_path / "again")
    assert_same(logits(dk.load_adapter(llama(), tmp_path / "again")), logits(model))


def test_a_classifier_that_the_config_does_not_name(tmp_path):
    """As PEFT wrote it before it listed the head in `modules_to_save`: the task alone says that it is trained."""
    model = pefts(bert(), target_modules=["query"], task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["modules_to_save"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = dk.load_adapter(bert(), tmp_path)
    assert_same(logits(loaded), logits(model))
    assert loaded.classifier.weight.requires_grad


def test_a_speech_models_adapter_runs_in_peft(tmp_path):
    """PEFT's class for SEQ_2_SEQ_LM passes `input_ids`, which a speech model does not take."""
    config = WhisperConfig(
        **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
        **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCAB},
        **{"num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32, "decoder_start_token_id": 1},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": None},
        begin_suppress_tokens=None,
    )

    def speech():
        torch.manual_seed(0)
        return WhisperForConditionalGeneration(config).eval()

    model = moved(dk.apply_dora(speech(), dk.DoraConfig(r=2, target_modules=["q_proj", "v_proj"])))
    dk.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(speech(), tmp_path).eval()
    inputs = {"input_features": torch.randn(2, 8, 64), "decoder_input_ids": NEW_IDS % VOCAB}
    with torch.no_grad():
        assert_same(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    "targets", [["q_proj", "gate_proj", "up_proj"], ["q_proj"], "all-linear"], ids=["dense MLP", "attention", "all"]
)
def test_where_peft_takes_dense_layers_for_experts_it_is_said(targets, tmp_path):
    config = Glm4MoeConfig(
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
        n_group=1,
        topk_group=1,
    )

    def experts():
        torch.manual_seed(0)
        return Glm4MoeForCausalLM(config).eval()

    model = moved(dk.apply_dora(experts(), dk.DoraConfig(r=3, target_modules=targets)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dk.save_adapter(model, tmp_path)
    assert torch.equal(logits(dk.load_adapter(experts(), tmp_path)), logits(model))
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, dk.DoraLinear)}
    assert ("gate_proj" in adapted) == ("gate_proj" in targets), "all-linear leaves it out"
    if any("PEFT cannot load the adapters of 4 layers" in str(warning.message) for warning in caught):
        with pytest.raises(ValueError, match="does not work with use_dora=True"):
            peft.PeftModel.from_pretrained(experts(), tmp_path)
        assert "gate_proj" in targets
    else:
        assert_same(logits(peft.PeftModel.from_pretrained(experts(), tmp_path).eval()), logits(model))
