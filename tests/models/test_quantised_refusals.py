"""A quantised weight that is not wholly here is refused by name, before any work."""

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

import dora_kernels as dk
from tests.support.fp4 import linear_fp4
from tests.support.fp8 import linear_fp8
from tests.support.int4 import linear_awq, linear_compressed, linear_gptq

BF16 = torch.bfloat16
KINDS = {
    "fp8": lambda: linear_fp8(64, 32),
    "nvfp4": lambda: linear_fp4("nvfp4", 64, 32)[0],
    "compressed": lambda: linear_compressed(64, 32, 16, BF16, symmetric=True)[0],
    "gptq": lambda: linear_gptq(64, 32, 16, BF16, act_order=True)[0],
    "awq": lambda: linear_awq(64, 32, 16, BF16)[0],
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def refused(model, message):
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        dk.apply_dora(model, dk.DoraConfig(r=2))
    assert dict(model.named_modules()) == before


@every_kind
def test_without_values(kind):
    refused(nn.Sequential(KINDS[kind]().to("meta")), r"^0\.\w+ is on the meta device, without values")


@every_kind
def test_offloaded(kind):
    model = nn.Sequential(KINDS[kind]())
    cpu_offload(model, torch.device("cpu"))
    refused(model, "^0 is offloaded by accelerate")


@pytest.mark.parametrize("kind", ["fp8", "nvfp4", "compressed"])
def test_sharded(kind):
    """As ZeRO-3 leaves a parameter; buffers, of which GPTQModel's layers are made, it does not share out."""
    layer = KINDS[kind]()
    largest = max(layer.parameters(), key=torch.Tensor.numel)
    largest.ds_shape = torch.Size((2, *largest.shape))
    refused(nn.Sequential(layer), r"^0\.\w+ is ZeRO-3's part of")
