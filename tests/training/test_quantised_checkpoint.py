"""Merged into a quantised checkpoint: the base's files but for codes, which are the nearest to W' in fp64."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.adapter_folders import load, our_adapter, printed_errors, updates
from tests.support.oracle import relative_error
from tests.support.quantised_bases import GROUPS, KINDS, bases, of_layer, read_fp8
from training.export import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def activations(groups):
    return {"group_0": groups["group_0"] | {"input_activations": {"num_bits": 8}}}


CODES = ("weight", "weight_packed", "qweight")
OTHER = {"mxfp4": "up_proj"}
"""What is adapted beside q_proj: groups of 32 do not divide down_proj's input features."""
every_kind = pytest.mark.parametrize("kind", KINDS)


def run(adapter, base, output, to):
    main(["--adapter", str(adapter), "--base_model", str(base), "--output_dir", str(output), "--to", to])


@every_kind
def test_codes_are_the_nearest_and_all_else_stays(kind, tmp_path, capsys):
    to, _, read, _ = KINDS[kind]
    plain, quantised = bases(tmp_path, kind)
    our_adapter(plain, tmp_path / "adapter", target_modules=["q_proj", OTHER.get(kind, "down_proj")])
    run(tmp_path / "adapter", quantised, tmp_path / "out", to)
    printed = printed_errors(capsys.readouterr().out.partition("warning")[0])
    before, after = (load_file(folder / "model.safetensors") for folder in (quantised, tmp_path / "out"))
    found = updates(plain, tmp_path / "adapter")
    assert before.keys() == after.keys() and len(found) == 4
    for key, tensor in before.items():
        path, _, name = key.rpartition(".")
        assert after[key].dtype == tensor.dtype and after[key].shape == tensor.shape
        if path not in found or name not in CODES:
            assert torch.equal(after[key], tensor), key
    for path, (weight, update) in found.items():
        error = read(of_layer(after, path)) - (weight + update)
        # FP4 is rounded to bf16 where it is decoded.
        rounding = 2**-8 * (weight + update).abs() if to == "fp4" else 0
        assert (error.abs() <= update.abs() * (1 + 1e-5) + rounding + 1e-6).all()
        assert printed[path] == pytest.approx((error.norm() / update.norm()).item(), rel=6e-3)
        assert 0 < printed[path] < 1
    for file in quantised.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_transformers_loads_fp8(tmp_path):
    """Where there is no GPU for it, decoded."""
    plain, quantised = bases(tmp_path, "fp8")
    our_adapter(plain, tmp_path / "adapter", target_modules=["q_proj"])
    run(tmp_path / "adapter", quantised, tmp_path / "out", "fp8")
    path = "model.layers.0.self_attn.q_proj"
    expected = read_fp8(of_layer(load_file(tmp_path / "out" / "model.safetensors"), path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert relative_error(loaded.get_submodule(path).weight, expected) <= 2**-8
    assert relative_error(load(plain).get_submodule(path).weight, expected) > 0.01


def test_a_small_update_is_warned_of(tmp_path, capsys):
    plain, quantised = bases(tmp_path, "compressed_tensors")
    our_adapter(plain, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights = load_file(plain / "model.safetensors")
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor.mul_(1e-3)
        if "magnitude" in key:
            path = key.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
            tensor.copy_(weights[f"{path}.weight"].norm(dim=1))
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    run(tmp_path / "adapter", quantised, tmp_path / "out", "int4")
    assert "warning: in 2 of 2 layers more than half of the update is lost" in capsys.readouterr().out
    run(tmp_path / "adapter", quantised, tmp_path / "dense", "bf16")
    assert "warning: in 2 of 2 layers rounding costs more than the whole update" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    plain, quantised = bases(tmp_path, "fp8")
    our_adapter(plain, tmp_path / "adapter", target_modules=["q_proj"])
    our_adapter(plain, tmp_path / "saved", target_modules=["q_proj"], modules_to_save=["lm_head"])
    our_adapter(plain, tmp_path / "wide", target_modules=["lm_head"])
    for adapter, base, to, message in (
        ("adapter", plain, "fp8", "plain is not quantised"),
        ("adapter", quantised, "int4", "quantised by fp8"),
        ("saved", quantised, "fp8", r"holds base_model\.model\.lm_head\.weight, and of an adapter only DoRA layers"),
        ("wide", quantised, "fp8", r"lm_head of .* cannot be read"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(tmp_path / adapter, base, tmp_path / "out", to)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "marlin-24"}, "is quantised by compressed-tensors marlin-24"),
        ({"config_groups": activations(GROUPS)}, "belongs to a layer that quantises activations, too"),
        ({"config_groups": GROUPS | {"group_1": GROUPS["group_0"]}}, "has 2 groups of layers"),
    ],
)
def test_a_checkpoint_half_understood_is_refused(change, message, tmp_path):
    plain, quantised = bases(tmp_path, "compressed_tensors")
    our_adapter(plain, tmp_path / "adapter", target_modules=["q_proj"])
    fields = json.loads((quantised / "config.json").read_text())
    fields["quantization_config"] |= change
    (quantised / "config.json").write_text(json.dumps(fields))
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(tmp_path / "adapter", quantised, tmp_path / "out", "int4")


@every_kind
def test_to_bf16_every_layer_is_decoded_and_the_merged_are_rounded_once(kind, tmp_path, capsys):
    _, _, read, _ = KINDS[kind]
    plain, quantised = bases(tmp_path, kind)
    model = our_adapter(plain, tmp_path / "adapter", target_modules=["q_proj", OTHER.get(kind, "down_proj")])
    run(tmp_path / "adapter", quantised, tmp_path / "out", "bf16")
    text = capsys.readouterr().out
    printed = printed_errors(text)
    before, after = (load_file(folder / "model.safetensors") for folder in (quantised, tmp_path / "out"))
    found = updates(plain, tmp_path / "adapter")
    assert "warning" not in text and len(found) == 4 and printed.keys() == {*found, "total"}
    for path, (weight, update) in found.items():
        error = after[f"{path}.weight"].double() - (weight + update)
        assert (error.abs() <= 2**-7 * (weight + update).abs() + 1e-6).all()
        assert printed[path] == pytest.approx((error.norm() / update.norm()).item(), rel=6e-3)
    for key, tensor in after.items():
        path, _, name = key.rpartition(".")
        assert tensor.dtype == torch.bfloat16
        if path not in found:
            decoded = before[key].double() if key in before and key != f"{path}.weight" else None
            if name == "weight":
                layer = of_layer(before, path)
                decoded = read(layer) if len(layer) > 1 else before[key].double()
            assert torch.equal(tensor, decoded.bfloat16()), key
    # transformers knows nothing of what it was.
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values()) and loaded.dtype == torch.bfloat16
    assert getattr(loaded.config, "quantization_config", None) is None
    expected = model.bfloat16()(torch.arange(6)[None]).logits
    assert relative_error(loaded(torch.arange(6)[None]).logits, expected) < 0.05


def test_to_bf16_in_several_files_with_an_index(tmp_path):
    plain, quantised = bases(tmp_path, "compressed_tensors")
    our_adapter(plain, tmp_path / "adapter", target_modules=["q_proj"])
    run(tmp_path / "adapter", quantised, tmp_path / "whole", "bf16")
    tensors = load_file(quantised / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    (quantised / "model.safetensors").unlink()
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, quantised / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (quantised / "model.safetensors.index.json").write_text(json.dumps(index))
    run(tmp_path / "adapter", quantised, tmp_path / "parts", "bf16")
    whole, found = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("whole", "parts"))
    after = found.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in whole.state_dict().items())
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    written = {key for file in shards for key in load_file(tmp_path / "parts" / file)}
    assert index["weight_map"].keys() == written


def test_to_bf16_a_layer_that_the_base_left_dense_is_merged_too(tmp_path):
    plain, quantised = bases(tmp_path, "compressed_fp8")
    our_adapter(plain, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    run(tmp_path / "adapter", quantised, tmp_path / "out", "bf16")
    weight, update = updates(plain, tmp_path / "adapter")["lm_head"]
    found = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].double()
    assert relative_error(found, weight + update) <= 2**-8
    with pytest.raises(SystemExit, match=r"lm_head of .* cannot be read: there is no weight_scale"):
        run(tmp_path / "adapter", quantised, tmp_path / "refused", "fp8")


def test_to_bf16_another_format_is_refused(tmp_path):
    plain, quantised = bases(tmp_path, "fp8")
    our_adapter(plain, tmp_path / "adapter", target_modules=["q_proj"])
    fields = json.loads((quantised / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "aqlm"}
    (quantised / "config.json").write_text(json.dumps(fields))
    with pytest.raises(SystemExit, match="is quantised by aqlm, which is not known here"):
        run(tmp_path / "adapter", quantised, tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()
