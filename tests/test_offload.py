"""Weights that accelerate keeps on the CPU or a disk: either engine first or offloading first, equal or refused."""

import accelerate
import pytest
import torch
from torch import nn

import dora_kernels as dk
from tests.interop import infer, peft_model
from tests.tiny_models import assert_unchanged, llama, logits, snapshot

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
OFFLOADS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
}
WHERE = pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)


def adapted():
    torch.manual_seed(0)
    model = dk.apply_dora(llama(layers=1), dk.DoraConfig(r=3)).eval()
    for layer in model.modules():
        if isinstance(layer, dk.DoraLinear):
            nn.init.normal_(layer.lora_B, std=0.1)
            layer.magnitude.data.mul_(1.3)
    return model


@WHERE
def test_offloaded_after_apply_dora(offload, tmp_path):
    model = adapted()
    expected = logits(model)
    offload(model, tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), expected)
    for refused in (dk.merge_dora, lambda model: dk.save_adapter(model, tmp_path / "adapter")):
        with pytest.raises(ValueError, match="is offloaded by accelerate"):
            refused(model)
    # Their weights are not there on entering: the norms would be of nothing.
    with pytest.raises(ValueError, match="offloaded by accelerate; load the model"), dk.frozen_adapters(model):
        pass
    assert torch.equal(logits(model), expected)


@WHERE
def test_apply_dora_on_an_offloaded_model_is_refused(offload, tmp_path):
    model = offload(llama(layers=1), tmp_path)
    before = snapshot(model)
    with pytest.raises(ValueError, match="is offloaded by accelerate"):
        dk.apply_dora(model, dk.DoraConfig())
    assert_unchanged(model, before)


@WHERE
@pytest.mark.parametrize("patched", ["before", "after", "never"])
def test_pefts_dora_does_not_run_offloaded_and_says_the_same_patched(patched, offload, tmp_path):
    model = peft_model(dtype=torch.float32, target_modules=["q_proj"]).eval()
    if patched == "before":
        assert len(dk.patch_peft(model).fused) == 2
    model = offload(model, tmp_path)
    if patched == "after":
        assert "on the meta device or offloaded" in str(dk.patch_peft(model))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        infer(model)
