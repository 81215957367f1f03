"""Merged into a quantised checkpoint: the base's files but for codes, which are the nearest to W' in fp64."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.adapter_folders import base_folder, load, our_adapter, printed_errors, updates
from tests.support.int4 import INTERLEAVED, decoded, parts, words
from tests.support.oracle import relative_error
from training.export import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BLOCK, GROUP = 16, 16


def fp8(weight):
    N, K = weight.shape
    scales = torch.rand(-(-N // BLOCK), -(-K // BLOCK)) / 100 + 0.01
    return {"weight": (weight / spread(scales, N, K)).to(torch.float8_e4m3fn), "weight_scale_inv": scales}


def spread(scales, N, K):
    return scales.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]


def read_fp8(tensors):
    codes = tensors["weight"].double()
    return codes * spread(tensors["weight_scale_inv"].double(), *codes.shape)


def compressed(weight):
    N, K = weight.shape
    codes, scales, _ = parts(N, K, GROUP, torch.float32, symmetric=True)
    return {"weight_packed": words(codes, 1), "weight_scale": scales, "weight_shape": torch.tensor((N, K))}


def gptq(weight):
    N, K = weight.shape
    codes, scales, zeros = parts(N, K, GROUP, torch.float32)
    groups = (torch.arange(K) // GROUP)[torch.randperm(K)]
    # The file holds zeros less one, of which 0 wraps: none is drawn.
    stored = words((zeros.clamp(min=1) - 1).T, 1)
    return {"qweight": words(codes.T, 0), "scales": scales.T.contiguous(), "qzeros": stored, "g_idx": groups.int()}


def awq(weight):
    N, K = weight.shape
    codes, scales, zeros = parts(N, K, GROUP, torch.float32)
    order = INTERLEAVED
    packed = {"qweight": words(codes.T, 1, order), "qzeros": words(zeros.T, 1, order)}
    return packed | {"scales": scales.T.contiguous()}


def unpacked(tensor, dim, order=range(8)):
    tensor = tensor.movedim(dim, -1)
    codes = torch.empty(*tensor.shape, 8, dtype=torch.int64)
    for place, element in enumerate(order):
        codes[..., element] = (tensor.long() >> (4 * place)) & 15
    return codes.flatten(-2).movedim(-1, dim)


def read_compressed(tensors):
    return decoded(unpacked(tensors["weight_packed"], 1), tensors["weight_scale"].double(), torch.tensor([[8]]).expand(
        tensors["weight_scale"].shape))  # fmt: skip


def read_gptq(tensors):
    zeros = unpacked(tensors["qzeros"], 1).T + 1
    return decoded(unpacked(tensors["qweight"], 0).T, tensors["scales"].T.double(), zeros, tensors["g_idx"].long())


def read_awq(tensors):
    zeros = unpacked(tensors["qzeros"], 1, INTERLEAVED).T
    return decoded(unpacked(tensors["qweight"], 1, INTERLEAVED).T, tensors["scales"].T.double(), zeros)


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": GROUP, "strategy": "group"}
GROUPS = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}}
KINDS = {
    "fp8": ("fp8", fp8, read_fp8, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}),
    "compressed_tensors": (
        "int4", compressed, read_compressed,
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": GROUPS},
    ),
    "gptq": ("int4", gptq, read_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "awq": ("int4", awq, read_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
}  # fmt: skip
CODES = ("weight", "weight_packed", "qweight")
every_kind = pytest.mark.parametrize("kind", KINDS)


def bases(path, kind):
    """A quantised base, and the plain one of its decoded weights, in fp32."""
    _, quantise, read, config = KINDS[kind]
    torch.manual_seed(0)
    plain, quantised = base_folder(path / "plain"), base_folder(path / "quantised")
    dense = load_file(plain / "model.safetensors")
    packed = {}
    for key, tensor in list(dense.items()):
        if key.endswith("_proj.weight"):
            layer = quantise(tensor)
            packed |= {f"{key.removesuffix('weight')}{name}": part for name, part in layer.items()}
            dense[key] = read(layer).float().contiguous()
        else:
            packed[key] = tensor
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, quantised / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    return plain, quantised


def run(adapter, base, output, to):
    main(["--adapter", str(adapter), "--base_model", str(base), "--output_dir", str(output), "--to", to])


def of_layer(tensors, path):
    prefix = f"{path}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


@every_kind
def test_codes_are_the_nearest_and_all_else_stays(kind, tmp_path, capsys):
    to, _, read, _ = KINDS[kind]
    plain, quantised = bases(tmp_path, kind)
    our_adapter(plain, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
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
        assert (error.abs() <= update.abs() * (1 + 1e-5) + 1e-6).all()
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
        ({"format": "marlin-24"}, "in the format marlin-24"),
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
