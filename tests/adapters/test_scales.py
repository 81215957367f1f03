"""g = m / n in the adapter's file: right for a server, and passed over by all that load adapters."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dora_kernels.adapters.save_load import PREFIX, SCALE, WEIGHTS_NAME, load_adapter, save_adapter
from dora_kernels.config import DoraConfig
from dora_kernels.models.apply import apply_dora
from dora_kernels.models.modules import dora_layers
from tests.adapters.test_save_load import randomize
from tests.support.int4 import linear_compressed
from tests.support.tiny_models import llama, logits
from tests.tolerances import ORACLE_FP32

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def adapted(model=None):
    model = apply_dora(model or llama(), DoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    randomize((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return model


def scales_of(folder):
    return {key: tensor for key, tensor in load_file(folder / WEIGHTS_NAME).items() if key.endswith(SCALE)}


def test_a_server_needs_no_norm(tmp_path):
    """y of the file's tensors and W, in fp64, against g of an independent norm."""
    model = adapted()
    save_adapter(model, tmp_path, scales=True)
    found = scales_of(tmp_path)
    assert found.keys() == {f"{PREFIX}{path}.{SCALE}" for path in dora_layers(model)}
    for path, layer in dora_layers(model).items():
        scale = found[f"{PREFIX}{path}.{SCALE}"]
        adapted_weight = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        expected = layer.magnitude.double() / adapted_weight.norm(dim=1)
        assert scale.dtype == torch.float32 and scale.shape == (layer.out_features,)
        assert (scale / expected - 1).abs().max() <= ORACLE_FP32


def test_of_a_zero_row_and_of_a_packed_weight(tmp_path):
    torch.manual_seed(0)
    layer, weight = linear_compressed(8, 32, 16, torch.float32)
    dense = nn.Linear(32, 8, bias=False)
    dense.weight.data[3] = 0
    model = adapted(nn.ModuleDict({"packed": layer, "dense": dense}))
    with torch.no_grad():
        model["dense"].lora_B.zero_()
        model["packed"].lora_B.zero_()
    save_adapter(model, tmp_path, scales=True)
    found = scales_of(tmp_path)
    assert found[f"{PREFIX}dense.{SCALE}"][3] == 0
    expected = model["packed"].magnitude.double() / weight.double().norm(dim=1)
    assert (found[f"{PREFIX}packed.{SCALE}"] / expected - 1).abs().max() <= ORACLE_FP32


def test_peft_loads_the_same_adapter_to_the_bit(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "with", scales=True)
    save_adapter(model, tmp_path / "without")
    assert not scales_of(tmp_path / "without")
    loaded = {name: peft.PeftModel.from_pretrained(llama(), tmp_path / name).eval() for name in ("with", "without")}
    states = {name: model.state_dict() for name, model in loaded.items()}
    assert states["with"].keys() == states["without"].keys()
    assert all(torch.equal(tensor, states["without"][name]) for name, tensor in states["with"].items())
    assert torch.equal(logits(loaded["with"]), logits(loaded["without"]))


def test_load_adapter_passes_over_it_and_its_digest_covers_it(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path, scales=True)
    assert torch.equal(logits(load_adapter(llama(), tmp_path).eval()), logits(model.eval()))
    path = tmp_path / WEIGHTS_NAME
    content = bytearray(path.read_bytes())
    scale = next(iter(scales_of(tmp_path).values())).numpy().tobytes()
    at = content.find(scale)
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its tensors do not match"):
        load_adapter(llama(), tmp_path)
