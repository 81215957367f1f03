"""Which GPU's blocks a launch takes."""

from types import SimpleNamespace

import pytest
import torch

from dora_kernels.ops.gpus import DEFAULT_GPU, GPUS, gpu_of


@pytest.mark.parametrize(
    ("capability", "known"),
    [((8, 0), (8, 0)), ((9, 0), (9, 0)), ((8, 7), (8, 9)), ((10, 3), (10, 0)), ((12, 1), (12, 0))],
)
def test_a_gpu_takes_those_of_its_own_or_of_its_major_version(capability, known, monkeypatch):
    """Those of another spilled, as 12.1 with Hopper's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gpu_of(SimpleNamespace(is_cuda=True, device=torch.device("cuda"))) is GPUS[known]


def test_an_unknown_version_and_the_interpreter_take_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (13, 0))
    for tensor in (SimpleNamespace(is_cuda=True, device=torch.device("cuda")), torch.empty(1)):
        assert gpu_of(tensor) is DEFAULT_GPU
