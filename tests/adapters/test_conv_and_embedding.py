"""The files of adapted embeddings and convolutions, to PEFT and back bit for bit."""

import peft
import pytest
import torch
from safetensors.torch import load_file

import dora_kernels as dk
from tests.support.images import TARGETS, batch, image_model, trained
from tests.support.oracle import relative_error
from tests.support.tiny_models import llama, logits
from tests.tolerances import SAME_FP32

pytestmark = pytest.mark.filterwarnings(
    "ignore:LoRA adapter added to ConvNd layer with groups", "ignore:Setting .save_embedding_layers"
)
DEPTHWISE = pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])


def config(**fields):
    return dk.DoraConfig(**{"r": 8, "target_modules": TARGETS, "rank_pattern": {"words": 3}} | fields)


@DEPTHWISE
def test_peft_loads_what_was_saved(tmp_path, depthwise):
    model, inputs = trained(dk.apply_dora(image_model(depthwise=depthwise), config())).eval(), batch()
    dk.save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(image_model(depthwise=depthwise), tmp_path / "ours").eval()
    with torch.no_grad():
        assert relative_error(loaded(*inputs), model(*inputs)) <= SAME_FP32
    loaded.save_pretrained(tmp_path / "pefts")
    ours, pefts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "pefts"))
    assert ours.keys() == pefts.keys()
    for name, tensor in ours.items():
        assert tensor.shape == pefts[name].shape and torch.equal(tensor, pefts[name]), name


@DEPTHWISE
def test_what_peft_saved_is_loaded(tmp_path, depthwise):
    lora = peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, use_dora=True)
    model, inputs = trained(peft.get_peft_model(image_model(depthwise=depthwise), lora)).eval(), batch()
    model.save_pretrained(tmp_path / "pefts")
    loaded = dk.load_adapter(image_model(depthwise=depthwise), tmp_path / "pefts").eval()
    with torch.no_grad():
        assert relative_error(loaded(*inputs), model(*inputs)) <= SAME_FP32
    dk.save_adapter(loaded, tmp_path / "ours")
    ours, pefts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "pefts"))
    assert ours.keys() == pefts.keys() and all(torch.equal(ours[name], pefts[name]) for name in pefts)


def test_a_resized_vocabulary_comes_along(tmp_path):
    """Of an adapted embedding PEFT stores the base layer too, below `base_layer`."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70, mean_resizing=False)
    dk.apply_dora(model, config(target_modules=["embed_tokens", "q_proj"], rank_pattern=None))
    dk.save_adapter(trained(model), tmp_path / "ours")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(
        tmp_path / "ours" / "adapter_model.safetensors"
    )
    fresh = type(model).from_pretrained(tmp_path / "base")
    fresh.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(logits(dk.load_adapter(fresh, tmp_path / "ours")), logits(model))
    other = type(model).from_pretrained(tmp_path / "base")
    other.resize_token_embeddings(70, mean_resizing=False)
    pefts = peft.PeftModel.from_pretrained(other, tmp_path / "ours")
    assert relative_error(logits(pefts), logits(model)) <= SAME_FP32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("patches", r"patches.lora_A.weight: expected shape \[4, 3, 2, 2\], got \[8, 3, 2, 2\]"),
        ("words", r"words.lora_embedding_A: expected shape \[4, 17\], got \[8, 17\]"),
    ],
)
def test_another_rank_is_named(tmp_path, name, message):
    fields = {"target_modules": [name], "rank_pattern": None}
    dk.save_adapter(dk.apply_dora(image_model(), config(**fields)), tmp_path)
    with pytest.raises(ValueError, match=message + ": an adapter of another rank"):
        dk.load_adapter(dk.apply_dora(image_model(), config(r=4, **fields)), tmp_path)
