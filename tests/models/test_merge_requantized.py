"""Merged into FP8 and NF4: the same scales, the nearest codes, and the loss as the log says it."""

import copy
import re

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import dora_kernels as dk
from dora_kernels.ops.base_weights import keep_packing
from tests.models.test_qdora import folder, load, randomise  # noqa: F401
from tests.models.test_qdora_merge import logits_of
from tests.ops.test_fp8_compressed import linear as compressed_fp8
from tests.support import fp8, nf4
from tests.support.int4 import linear_compressed
from tests.support.oracle import relative_error
from tests.tolerances import SAME_FP32

LOG = "dora_kernels.models.merge"


def fp8_model():
    torch.manual_seed(0)
    return nn.Sequential(fp8.linear_fp8(64, 32, bias=True), nn.ReLU(), fp8.linear_fp8(8, 64))


def nf4_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nf4.linear_4bit(torch.randn(64, 64), bias=torch.randn(64)), nn.ReLU(), nf4.linear_4bit(torch.randn(8, 64))
    )


DECODED = {fp8_model: lambda layer: fp8.decoded(layer).double(), nf4_model: lambda layer: nf4.decoded(layer.weight)}
every_model = pytest.mark.parametrize("make", DECODED)


def adapted(make, update=0.3):
    model = make()
    before = [DECODED[make](model[place]) for place in (0, 2)]
    dk.apply_dora(model, dk.DoraConfig(r=4, lora_alpha=8))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.lora_B, std=update)
            layer.magnitude.mul_(1 + update * torch.randn_like(layer.magnitude))
    return model, before


def exact(layer, base):
    """W' in fp64."""
    moved = base + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    return layer.magnitude.double()[:, None] * moved / moved.norm(dim=1, keepdim=True)


@every_model
def test_the_log_says_the_share_of_the_update_that_is_lost(make, caplog):
    model, bases = adapted(make)
    truths = [exact(model[place], base) for place, base in zip((0, 2), bases)]
    with caplog.at_level("INFO", logger=LOG):
        dk.merge_dora(model, base="requantized")
    for place, base, truth in zip("02", bases, truths):
        found = DECODED[make](model[int(place)])
        share = (found - truth).norm() / (truth - base).norm()
        (said,) = [
            text for text in caplog.messages if text.startswith(f"{place}: requantising the merged weight costs")
        ]
        assert float(re.search(r"costs (\S+) of", said)[1]) == pytest.approx(share.item(), rel=0.06)
        assert 0.01 < share < 1


@every_model
def test_a_fresh_adapter_changes_nothing(make, caplog):
    """Of FP8 but for the sign of a zero."""
    model = make()
    before = copy.deepcopy(model.state_dict())
    dk.merge_dora(dk.apply_dora(model, dk.DoraConfig(r=4)), base="requantized")
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name].float(), tensor.float()), name
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@every_model
def test_a_drowned_update_is_warned_of(make, caplog):
    model, _ = adapted(make, update=1e-4)
    dk.merge_dora(model, base="requantized")
    (warning,) = caplog.messages
    assert "costs more than half the update in 2 of 2 layers" in warning and "the dequantised base" in warning


@every_model
def test_unmerging_gives_back_the_codes(make):
    model, _ = adapted(make)
    x = torch.randn(3, model[0].in_features)
    y = model(x)
    dk.merge_dora(model, base="requantized", keep_base=True)
    assert not isinstance(model[0], dk.DoraLinear)
    assert torch.equal(dk.unmerge_dora(model)(x), y)


def test_a_4_bit_model_is_saved_and_loaded_by_transformers(folder, tmp_path):  # noqa: F811
    model = dk.apply_dora(load(folder), dk.DoraConfig(r=4, lora_alpha=8)).eval()
    randomise(model)
    expected = logits_of(model)
    fresh = logits_of(load(folder))
    merged = dk.merge_dora(model, base="requantized")
    assert isinstance(merged.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    keep_packing(loaded)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert relative_error(logits_of(loaded), logits_of(merged)) <= SAME_FP32
    # The update is large enough to come through four bits.
    assert relative_error(logits_of(merged), expected) < relative_error(fresh, expected)


@pytest.mark.parametrize("make", [lambda: linear_compressed(8, 32, 16), lambda: compressed_fp8("channel")])
def test_compressed_tensors_is_refused_by_name(make):
    model = dk.apply_dora(nn.Sequential(make()[0]), dk.DoraConfig(r=4))
    layer = model[0]
    with pytest.raises(ValueError, match="0 cannot be merged in its own format: it is a Linear"):
        dk.merge_dora(model, base="requantized")
    assert model[0] is layer
