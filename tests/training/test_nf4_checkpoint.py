"""`--to nf4` and `--to bf16` through bitsandbytes: what transformers saves and loads is what was requantised."""

import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dora_kernels as dk
from dora_kernels.models.modules import dora_layers
from dora_kernels.ops.base_weights import keep_packing, weight_of
from dora_kernels.ops.dispatch import dense_weight
from dora_kernels.ops.requantize import requantized
from tests.models.test_qdora import folder  # noqa: F401
from tests.support.adapter_folders import printed_errors
from training.export import main
from training.model.base_model import nf4_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TARGETS = ["q_proj", "down_proj"]


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", **options)


def in_nf4(path):
    return load(path, quantization_config=nf4_config(torch.bfloat16))


@pytest.fixture
def bases(folder, tmp_path):  # noqa: F811
    """The dense base, the same as a checkpoint in NF4, and an adapter that was trained on that."""
    in_nf4(folder).save_pretrained(tmp_path / "nf4")
    model = dk.apply_dora(load(tmp_path / "nf4"), dk.DoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in dora_layers(model).values():
            layer.lora_B.normal_(std=0.1)
            layer.magnitude.mul_(1 + 0.1 * torch.randn_like(layer.magnitude))
    dk.save_adapter(model, tmp_path / "adapter")
    return {"dense": folder, "nf4": tmp_path / "nf4"}, model


def run(tmp_path, base, to):
    flags = {"adapter": tmp_path / "adapter", "base_model": base, "output_dir": tmp_path / "out", "to": to}
    main([f"--{name}={value}" for name, value in flags.items()])
    return load(tmp_path / "out")


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_what_is_loaded_has_the_requantised_bits(base, bases, tmp_path, capsys):
    folders, model = bases
    loaded = run(tmp_path, folders[base], "nf4")
    printed = printed_errors(capsys.readouterr().out.partition("warning")[0])
    assert loaded.config.quantization_config.bnb_4bit_quant_type == "nf4"
    layers = dora_layers(model)
    assert len(layers) == 2 and printed.keys() == {*layers, "total"}
    for path, layer in layers.items():
        packed, exact, dense = layer.base_weight, layer.merged_weight(torch.float32), layer.dense_base(torch.float32)
        expected = requantized(packed, exact)
        found = weight_of(loaded.get_submodule(path))
        for name in ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert not torch.equal(found.packed, packed.packed)
        cost = (dense_weight(expected, torch.float32) - exact).norm() / (exact - dense).norm()
        assert printed[path] == pytest.approx(cost.item(), rel=6e-3)
    other, before = (m.model.layers[0].self_attn.k_proj for m in (loaded, load(folders["nf4"])))
    assert type(other) is bnb.nn.Linear4bit and torch.equal(weight_of(other).packed, weight_of(before).packed)
    keep_packing(loaded)
    assert torch.isfinite(loaded(torch.arange(6)[None]).logits).all()


def test_to_bf16_of_a_base_in_nf4_is_dense(bases, tmp_path):
    folders, model = bases
    loaded = run(tmp_path, folders["nf4"], "bf16")
    assert getattr(loaded.config, "quantization_config", None) is None and loaded.dtype == torch.bfloat16
    for path, layer in dora_layers(model).items():
        assert torch.equal(loaded.get_submodule(path).weight, layer.merged_weight(torch.bfloat16))
    other = model.model.layers[0].self_attn.k_proj
    expected = dense_weight(weight_of(other), torch.bfloat16)
    assert torch.equal(loaded.model.layers[0].self_attn.k_proj.weight, expected)


def test_to_bf16_of_a_dense_base_rounds_once(folder, tmp_path):  # noqa: F811
    load(folder).float().save_pretrained(tmp_path / "base")
    model = dk.apply_dora(load(tmp_path / "base"), dk.DoraConfig(r=3, target_modules=TARGETS))
    with torch.no_grad():
        for layer in dora_layers(model).values():
            layer.lora_B.normal_(std=0.1)
    dk.save_adapter(model, tmp_path / "adapter")
    assert {p.dtype for p in run(tmp_path, tmp_path / "base", "bf16").parameters()} == {torch.bfloat16}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for path, layer in dora_layers(model).items():
        assert torch.equal(stored[f"{path}.weight"], layer.merged_weight(torch.bfloat16))


def test_another_quantised_base_is_refused(bases, tmp_path):
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"takes a dense base, or one in NF4, and .* is quantised by fp8"):
        run(tmp_path, tmp_path / "nf4", "nf4")
    assert not (tmp_path / "out").exists()
