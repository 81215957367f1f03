"""g = m / n in the adapter's file: right for a server, and passed over by all that load adapters."""

from itertools import product

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dora_kernels.adapters.save_load import PREFIX, SCALE, WEIGHTS_NAME, load_adapter, save_adapter
from dora_kernels.config import DoraConfig
from dora_kernels.layers.experts import adapted_experts
from dora_kernels.models.apply import apply_dora
from dora_kernels.models.modules import dora_layers
from tests.models.test_experts import adapted as adapted_mixture
from tests.support.int4 import linear_compressed
from tests.support.oracle import relative_error
from tests.support.tiny_experts import BATCH, tiny_experts
from tests.support.tiny_models import llama, logits
from tests.support.trained_adapters import randomize
from tests.tolerances import ORACLE_FP32

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
PLACES = (("model.layers.0", "model.layers.1"), (("", "down_proj"), (".base_layer", "gate_up_proj")))
"""Layers of a mixture; where PEFT's nesting puts each stack of a layer."""


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


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_of_every_expert(tmp_path, name):
    """y of a token by the file's tensors alone, against the model's merged experts; PEFT is not there."""
    model = adapted_mixture(name, torch.float64, target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="PEFT has no DoRA for stacks of experts"):
        save_adapter(model, tmp_path, scales=True)
    tensors, found = load_file(tmp_path / WEIGHTS_NAME), scales_of(tmp_path)
    assert len(found) == 2 + 2 * 2
    stacks = {f"{path}.mlp.experts{at}": f"{path}.mlp.experts.{stack}" for path, (at, stack) in product(*PLACES)}
    for path, stack in stacks.items():
        adapter, prefix = adapted_experts(model)[stack], f"{PREFIX}{path}"
        experts, out_features, in_features = adapter.stack.shape
        A = tensors[f"{prefix}.lora_A.weight"].view(experts, 3, in_features)
        B = tensors[f"{prefix}.lora_B.weight"].view(out_features, 3, experts).permute(2, 0, 1)
        update = adapter.stack + adapter.scaling * B @ A
        scale = found[f"{prefix}.{SCALE}"]
        assert scale.dtype == torch.float32 and scale.shape == (experts, out_features)
        merged = torch.stack([adapter.merged_expert(expert) for expert in range(experts)])
        assert relative_error(scale[..., None] * update, merged) <= ORACLE_FP32
    base = tiny_experts(name)
    assert torch.equal(load_adapter(base, tmp_path)(BATCH).logits, model(BATCH).logits)


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
