"""Adapters on disk: PEFT reads ours and we read PEFT's, to the bit."""

import json
import sys

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_kernels.adapters.peft_config import HONOURED
from dora_kernels.adapters.save_load import load_adapter, save_adapter
from dora_kernels.config import DoraConfig
from dora_kernels.models.apply import apply_dora
from dora_kernels.models.modules import dora_layers
from tests.support.marks import slow
from tests.support.tiny_models import FAMILIES, assert_unchanged, bert, llama, logits, snapshot
from tests.support.trained_adapters import adapter_tensors, assert_same_bits, ours, pefts
from tests.tolerances import SAME_FP32

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
pytestmark = [
    # PEFT asks transformers a question by an old name, and speaks up about GPT-2's Conv1D and tied heads.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:modules_to_save"),
]

VARIANTS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear", "lora_dropout": 0.1},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {r".*\.1\..*": 7},
        "alpha_pattern": {r".*\.0\..*": 3},
    },
}


def assert_same_logits(actual, expected, base):
    """Equal to fp32's noise, of logits that the adapter moved by a thousand times that."""
    scale = expected.abs().max()
    assert (actual - expected).abs().max() <= SAME_FP32 * scale
    assert (expected - base).abs().max() > 1e-2 * scale


@pytest.mark.parametrize(
    ("variant", "compat"),
    [
        *((variant, "peft") for variant in VARIANTS),
        ("patterns", "transformers"),
        *(slow(variant, "transformers") for variant in ("plain", "rslora")),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_we_save(family, variant, compat, tmp_path):
    model = ours(FAMILIES[family](), **VARIANTS[variant])
    save_adapter(model, tmp_path, compat=compat)
    base = FAMILIES[family]()
    before = logits(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_same_bits(adapter_tensors(loaded), adapter_tensors(model))
    assert_same_logits(logits(loaded), logits(model), before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_we_load_what_peft_saves(family, variant, tmp_path):
    model = pefts(FAMILIES[family](), **VARIANTS[variant])
    model.save_pretrained(tmp_path)
    base = FAMILIES[family]()
    before = logits(base)
    assert load_adapter(base, tmp_path) is base
    assert_same_bits(adapter_tensors(base), adapter_tensors(model))
    assert_same_logits(logits(base), logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_peft_the_small_config_loads_in_peft_all_the_same(family, tmp_path, monkeypatch):
    model = ours(FAMILIES[family](), **VARIANTS["patterns"])
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "peft", None)
        save_adapter(model, tmp_path)
    assert "peft_version" not in json.loads((tmp_path / CONFIG).read_text())
    base = FAMILIES[family]()
    before = logits(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_same_bits(adapter_tensors(loaded), adapter_tensors(model))
    assert_same_logits(logits(loaded), logits(model), before)


@pytest.mark.parametrize("compat", ["peft", "transformers"])
def test_our_own_round_trip_is_exact(compat, tmp_path):
    model = ours(llama(), **VARIANTS["rslora"], exclude_modules=["k_proj"], modules_to_save=["lm_head"])
    save_adapter(model, tmp_path, compat=compat)
    loaded = load_adapter(llama(), tmp_path)
    assert_same_bits(adapter_tensors(loaded), adapter_tensors(model))
    assert torch.equal(logits(loaded), logits(model))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    for name in set(HONOURED) - {"target_modules"}:
        read, written = (getattr(m.dora_config, name) or None for m in (loaded, model))
        assert read == written, name
    assert loaded.dora_config.target_modules == sorted(dora_layers(model))


def test_the_files_are_pefts(tmp_path):
    save_adapter(ours(llama(), r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path)
    pefts(llama(), r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]).save_pretrained(tmp_path / "peft")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [CONFIG, WEIGHTS]
    layouts = []
    for directory in (tmp_path, tmp_path / "peft"):
        with safe_open(directory / WEIGHTS, "pt") as file:
            assert file.metadata()["format"] == "pt"
        layouts.append({key: (t.shape, t.dtype) for key, t in load_file(directory / WEIGHTS).items()})
    assert layouts[0] == layouts[1]


@pytest.mark.parametrize("compat", ["peft", "transformers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_loader(family, compat, tmp_path):
    """It drops magnitudes under PEFT's key without a word, and keeps every bit under `compat="transformers"`."""
    save_adapter(ours(FAMILIES[family](), **VARIANTS["plain"]), tmp_path, compat=compat)
    through_peft = peft.PeftModel.from_pretrained(FAMILIES[family](), tmp_path).eval()
    model = FAMILIES[family]()
    before = logits(model)
    model.load_adapter(str(tmp_path))
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), logits(through_peft)) == (compat == "transformers")
    expected = dict(through_peft.base_model.model.named_parameters())
    for name, parameter in model.named_parameters():
        kept = compat == "transformers" or "magnitude" not in name
        assert torch.equal(parameter, expected[name]) == kept, name


def test_modules_to_save_travel_both_ways(tmp_path):
    fields = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    model = ours(bert(), **fields)
    save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "ours").eval()
    assert_same_bits(adapter_tensors(loaded), adapter_tensors(model))
    assert_same_logits(logits(loaded), logits(model), logits(bert()))

    # PEFT adds "score", which BERT lacks, beside "classifier".
    model = pefts(bert(), **fields, task_type="SEQ_CLS")
    assert "score" in model.peft_config["default"].modules_to_save
    model.save_pretrained(tmp_path / "pefts")
    loaded = load_adapter(bert(), tmp_path / "pefts")
    assert loaded.dora_config.modules_to_save == ["classifier"]
    assert_same_bits(adapter_tensors(loaded), adapter_tensors(model))
    assert_same_logits(logits(loaded), logits(model), logits(bert()))


def test_targets_of_other_models_in_the_file_are_passed_over(tmp_path):
    model = pefts(llama(), r=2, target_modules=["q_proj", "c_attn"])
    model.save_pretrained(tmp_path)
    loaded = load_adapter(llama(), tmp_path)
    assert loaded.dora_config.target_modules == ["q_proj"]
    assert_same_bits(adapter_tensors(loaded), adapter_tensors(model))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_file_of_another_dtype_is_loaded_as_fp32(stored, tmp_path):
    model = ours(llama(dtype=torch.bfloat16), r=2)
    save_adapter(model, tmp_path)
    tensors = {key: tensor.to(stored) for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    loaded = load_adapter(llama(dtype=torch.bfloat16), tmp_path)
    assert_same_bits(adapter_tensors(loaded), {key: tensor.float() for key, tensor in tensors.items()})


def test_a_patched_model_keeps_its_own_settings(tmp_path):
    model = ours(llama(), r=3, lora_alpha=6)
    save_adapter(model, tmp_path)
    config = DoraConfig(r=3, lora_alpha=6, lora_dropout=0.2, dropout_mode="peft", impl="reference", space="weight")
    loaded = apply_dora(llama(), config)
    parameters = {name: id(parameter) for name, parameter in loaded.named_parameters()}
    load_adapter(loaded, tmp_path)
    # An optimizer that was built before holds the same parameters.
    assert {name: id(parameter) for name, parameter in loaded.named_parameters()} == parameters
    assert loaded.dora_config == config
    assert_same_bits(adapter_tensors(loaded), adapter_tensors(model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"r": 4, "lora_alpha": 8},
            r"lora_A.weight: expected shape \[4, 48\], got \[3, 48\]: an adapter of another rank",
        ),
        ({"r": 3, "lora_alpha": 9}, "the model has r=3, lora_alpha=9.*the adapter's config r=3, lora_alpha=6"),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, "use_rslora=True, the adapter's"),
        ({"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}, "unexpected keys: model.layers.0.mlp"),
        (
            {"r": 3, "lora_alpha": 6, "modules_to_save": ["lm_head"]},
            "missing keys: lm_head.weight; unexpected keys: none",
        ),
    ],
    ids=["rank", "alpha", "rslora", "targets", "modules_to_save"],
)
def test_a_patched_model_that_does_not_match_is_refused(fields, message, tmp_path):
    save_adapter(ours(llama(), r=3, lora_alpha=6), tmp_path)
    model = apply_dora(llama(), DoraConfig(**fields))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)
