"""A checkpoint that compressed-tensors packed, from the command line to an export that the library loads again."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dora_kernels.models.modules import dora_layers
from dora_kernels.ops.base_weights import weight_of
from dora_kernels.ops.dispatch import dense_weight
from tests.support.marks import slow
from tests.support.oracle import relative_error
from tests.support.training_runs import data, one_layer_base, run  # noqa: F401
from training.export import main as export
from training.exporting import Sources

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

GROUP = {"pack-quantized": 16, "nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32, "float-quantized": None}
TO = {"pack-quantized": "int4", "nvfp4-pack-quantized": "fp4", "mxfp4-pack-quantized": "fp4", "float-quantized": "fp8"}
every_form = pytest.mark.parametrize("form", TO)


def scheme_of(form):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    fields = {
        "num_bits": 4, "type": "int" if TO[form] == "int4" else "float", "symmetric": True,
        "group_size": GROUP[form], "strategy": "tensor_group" if form.startswith("nv") else "group",
    }  # fmt: skip
    if TO[form] == "fp8":
        fields |= {"num_bits": 8, "strategy": "channel"}
    return fields, QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**fields), format=form)


def compressor_of(form):
    from compressed_tensors.compressors.base import BaseCompressor

    return BaseCompressor.get_value_from_registry(form)


def packed_base(folder, form):
    """A random model whose layers the library itself packed."""
    one_layer_base(folder, intermediate_size=320)
    fields, scheme = scheme_of(form)
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if not key.endswith("_proj.weight"):
            tensors[key] = tensor
            continue
        largest = tensor.unflatten(1, (-1, GROUP[form] or tensor.shape[1])).abs().amax(-1)
        parts = {"weight": tensor, "weight_scale": (largest / 7.5).to(tensor.dtype)}
        if form.startswith("nv"):
            parts["weight_global_scale"] = (448 * 6 / tensor.abs().max().float()).view(1)
            parts["weight_scale"] = (largest / 6 * parts["weight_global_scale"]).to(torch.float8_e4m3fn).float()
        elif TO[form] == "fp8":
            parts["weight_scale"] = (largest / 448).to(tensor.dtype)
        elif form.startswith("mx"):
            parts["weight_scale"] = 2.0 ** torch.ceil(torch.log2(largest / 6))
        packed = compressor_of(form).compress(parts, scheme)
        tensors |= {f"{key.removesuffix('weight')}{name}": part.contiguous() for name, part in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": fields, "format": form}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_the_library(layer, form):
    """W, as it decompresses the layer's tensors."""
    tensors = {name: parameter.data for name, parameter in layer.named_parameters()}
    return compressor_of(form).decompress(tensors, scheme_of(form)[1])["weight"]


@pytest.mark.parametrize("form", [slow(form) if form.startswith("mx") else form for form in TO])
def test_trained_saved_exported_and_loaded_again(form, data, tmp_path):  # noqa: F811
    base, out = packed_base(tmp_path / "base", form), tmp_path / "out"
    for path, layer in AutoModelForCausalLM.from_pretrained(base).named_modules():
        if hasattr(layer, "weight_scale"):
            weight = weight_of(layer)
            assert torch.equal(dense_weight(weight, weight.dtype), by_the_library(layer, form)), path
    run(data, out, base_model=base, val_set_size=0, eval_step=None, max_steps=3)
    model = Sources(out, str(base), may_be_quantised=True).load()
    layers = dora_layers(model)
    assert len(layers) == 7 and all(layer.lora_B.abs().max() > 0 for layer in layers.values())
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    for to in (TO[form], "bf16"):
        export([f"--adapter={out}", f"--base_model={base}", f"--output_dir={tmp_path / to}", f"--to={to}"])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / TO[form])
    for path, layer in layers.items():
        exact, dense = layer.merged_weight(torch.float32), layer.dense_base(torch.float32)
        found = by_the_library(again.get_submodule(path), form).float()
        assert not torch.equal(found, dense) and (found - exact).norm() <= (dense - exact).norm()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert relative_error(loaded(ids).logits, expected) < 0.03
