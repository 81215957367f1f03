"""An adapter's two files take their places together, and a disk that fails leaves the pair that was there."""

import pytest
import torch

from dora_kernels.adapters import save_load as adapter_module
from dora_kernels.adapters.save_load import load_adapter, save_adapter
from dora_kernels.config import DoraConfig
from dora_kernels.models.apply import apply_dora
from tests.support.disk_faults import KINDS, Faults
from tests.support.tiny_models import llama

TARGETS = ["q_proj"]


def adapted(r):
    return apply_dora(llama(), DoraConfig(r=r, lora_alpha=6, target_modules=TARGETS))


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_whichever_write_fails_the_old_adapter_or_the_new_one_is_there(kind, tmp_path):
    old, new = adapted(2), adapted(3)
    save_adapter(new, tmp_path / "new")
    save_adapter(old, tmp_path / "out")
    before, whole = contents(tmp_path / "out"), contents(tmp_path / "new")
    with Faults(tmp_path / "other") as counted:
        save_adapter(new, tmp_path / "other")
    raised = 0
    for strike in range(len(counted.calls) - 1):  # the folder is there already
        with Faults(tmp_path / "out", strike, kind) as faults:
            try:
                save_adapter(new, tmp_path / "out")
                done = True
            except OSError:
                done, raised = False, raised + 1
        assert faults.struck
        left = contents(tmp_path / "out")
        assert left == whole or (left == before and not done), faults.calls[strike]
        load_adapter(llama(), tmp_path / "out")
        save_adapter(old, tmp_path / "out")
    assert raised >= 5, "writing both, syncing both, renaming both"


def test_equal_adapters_are_equal_files(tmp_path):
    """safetensors alone writes the entries of its header in random order."""
    model = adapted(2)
    for number in range(8):
        save_adapter(model, tmp_path / str(number))
    assert len({(tmp_path / str(number) / adapter_module.WEIGHTS_NAME).read_bytes() for number in range(8)}) == 1


def test_a_full_disk_is_an_oserror_though_safetensors_makes_an_error_of_its_own(tmp_path):
    with Faults(tmp_path) as counted:
        save_adapter(adapted(2), tmp_path / "a")
    strike = next(number for number, call in enumerate(counted.calls) if call.startswith("tensors"))
    with Faults(tmp_path, strike), pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(2), tmp_path / "b")
    assert not any((tmp_path / "b").iterdir())


def test_bf16_has_digests(tmp_path):
    model = adapted(2).to(torch.bfloat16)
    save_adapter(model, tmp_path)
    load_adapter(llama(torch.bfloat16), tmp_path)
