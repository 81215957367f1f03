"""accelerate's offloading in its four orders: the engine before or after it, ours or PEFT's model fused. Inference is
equal to the bit, or refused with what to do; training, which would silently train nothing, is refused."""

import accelerate
import peft
import pytest
import torch

import dora_kernels as dk
from tests.support.tiny_models import VOCAB, assert_unchanged, llama, logits, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
CONFIG = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
PLACES |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
REMEDY = "load the model without cpu or disk in its device_map"


def to_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def to_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def by_map(model, folder):
    """Half of the layers stay where they are."""
    return accelerate.dispatch_model(model, PLACES, main_device="cpu", offload_dir=folder)


def ours():
    torch.manual_seed(0)
    return trained(dk.apply_dora(llama(), dk.DoraConfig(**CONFIG)))


def pefts():
    torch.manual_seed(0)
    return trained(peft.get_peft_model(llama(), peft.LoraConfig(use_dora=True, **CONFIG)))


def trained(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def train(model):
    tokens = torch.arange(18).reshape(2, 9) % VOCAB
    model.train()(input_ids=tokens, labels=tokens).loss.backward()


WAYS = pytest.mark.parametrize("offload", [to_cpu, to_disk, by_map], ids=lambda offload: offload.__name__)
WHOLE = pytest.mark.parametrize("offload", [to_cpu, to_disk], ids=lambda offload: offload.__name__)


@WAYS
def test_apply_dora_and_then_offload(offload, tmp_path):
    model = offload(ours(), tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), logits(ours()))
    with pytest.raises(ValueError, match=f"would not train.*{REMEDY}"):
        train(model)
    assert torch.equal(logits(model.eval()), logits(ours()))
    with pytest.raises(ValueError, match=f"cannot freeze an adapter: .*{REMEDY}"), dk.frozen_adapters(model):
        pass
    for act in (lambda: dk.merge_dora(model), lambda: dk.save_adapter(model, tmp_path / "adapter")):
        with pytest.raises(ValueError, match=f"is offloaded by accelerate.*{REMEDY}"):
            act()
    assert not (tmp_path / "adapter").exists()


@WAYS
def test_offload_and_then_apply_dora(offload, tmp_path):
    model = offload(llama(), tmp_path)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"is offloaded by accelerate.*{REMEDY}"):
        dk.apply_dora(model, dk.DoraConfig(**CONFIG))
    assert_unchanged(model, before)


@WHOLE
def test_patch_peft_and_then_offload(offload, tmp_path):
    model = pefts()
    dk.patch_peft(model)
    model = offload(model, tmp_path)
    for act in (logits, train):
        with pytest.raises(ValueError, match=f"cannot run DoRA, PEFT's or fused: .*{REMEDY}"):
            act(model)
    with model.disable_adapter():
        assert torch.equal(logits(model.eval()), logits(llama())), "PEFT's own forward needs no norm then"


@WHOLE
def test_offload_and_then_patch_peft(offload, tmp_path):
    model = offload(pefts(), tmp_path)
    report = dk.patch_peft(model)
    assert not report.fused and all("offloaded" in reason for reason in report.skipped.values())
    for act in (logits, train):
        with pytest.raises(ValueError, match=f"cannot run DoRA, PEFT's or fused: .*{REMEDY}"):
            act(model)


def test_a_device_map_without_offloading_is_none(tmp_path):
    model = accelerate.dispatch_model(ours(), dict.fromkeys(PLACES, "cpu"), main_device="cpu", force_hooks=True)
    assert torch.equal(logits(model), logits(ours()))
    train(model)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
