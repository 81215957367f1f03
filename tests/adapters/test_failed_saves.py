"""A save that is refused or interrupted: what stood there before still stands."""

import os

import pytest
import torch
from torch import nn

from dora_kernels.adapters import save_load as adapter_module
from dora_kernels.adapters.save_load import save_adapter
from dora_kernels.config import DoraConfig
from dora_kernels.models.apply import apply_dora
from dora_kernels.models.merge import merge_dora
from dora_kernels.models.modules import dora_layers
from tests.support.tiny_models import llama
from tests.support.trained_adapters import ours, pefts

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def test_a_kill_while_saving_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = ours(llama(), r=2)
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        next(iter(dora_layers(model).values())).lora_A.zero_()
    for name in ("save_with_header", "write_config"):
        with monkeypatch.context() as patched:
            patched.setattr(adapter_module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                save_adapter(model, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # The new file takes the old one's name; the old one, here under a second name, is never written to.
    os.link(tmp_path / WEIGHTS, tmp_path / "old")
    save_adapter(model, tmp_path)
    assert (tmp_path / "old").read_bytes() == before[WEIGHTS]
    assert (tmp_path / WEIGHTS).read_bytes() != before[WEIGHTS]
    assert {path.name for path in tmp_path.iterdir()} == {*before, "old"}


def killed(*args, **kwargs):
    raise KeyboardInterrupt


def test_what_cannot_be_saved(tmp_path):
    model = ours(llama(), r=2)
    with pytest.raises(ValueError, match='compat should be "peft" or "transformers", got "hf"'.replace('"hf"', "'hf'")):
        save_adapter(model, tmp_path, compat="hf")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="should be a directory"):
        save_adapter(model, tmp_path / "file")
    with pytest.raises(ValueError, match="the model that apply_dora returned"):
        save_adapter(llama(), tmp_path)
    with pytest.raises(ValueError, match="the model that apply_dora returned, not a wrapper"):
        save_adapter(nn.Sequential(model), tmp_path)
    with pytest.raises(ValueError, match="PEFT's"):
        save_adapter(pefts(llama(), r=2, target_modules=["q_proj"]), tmp_path)
    path, layer = next(iter(dora_layers(model).items()))
    with torch.no_grad():
        layer.magnitude[3] = float("nan")
    with pytest.raises(ValueError, match=f"{path}.magnitude holds NaN"):
        save_adapter(model, tmp_path)
    model = merge_dora(ours(llama(), r=2), keep_base=True)
    with pytest.raises(ValueError, match="before merge_dora"):
        save_adapter(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_first_save_that_fails_leaves_nothing(error, tmp_path, monkeypatch):
    model = apply_dora(llama(), DoraConfig(r=2, target_modules=["q_proj"]))
    replace = os.replace

    def fails_at_the_weights(source, target):
        if str(target).endswith(".safetensors"):
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_at_the_weights)
    with pytest.raises(type(error)):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
