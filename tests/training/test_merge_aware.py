"""Train what you serve: what `merge_aware` trained is, bit for bit, what export writes in the base's own format."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import dora_kernels as dk
from dora_kernels.models.modules import dora_layers
from dora_kernels.ops.base_weights import keep_packing
from tests.models.test_qdora import folder  # noqa: F401
from tests.models.test_qdora import load as load_nf4
from tests.support.adapter_folders import base_folder, load, printed_errors
from tests.support.marks import slow
from tests.support.quantised_bases import KINDS, bases, of_layer
from tests.support.training_runs import data, run  # noqa: F401
from tests.training.test_compressed_tensors import TO, by_the_library, packed_base
from training.export import main as export
from training.exporting import Sources
from training.quantised_checkpoint import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(12)[None]
TARGETS = {"mxfp4": ["q_proj", "up_proj"]}
every_kind = pytest.mark.parametrize("kind", KINDS)


def in_format(plain, quantised, targets):
    """The plain model with its targets in the checkpoint's format, as the engine reads a library's layers."""
    model, checkpoint = load(plain), Checkpoint.of(str(quantised))
    for path in checkpoint.quantised:
        if path.rpartition(".")[2] in targets:
            tensors = of_layer(load_file(quantised / "model.safetensors"), path)

            def get(name, optional=False, tensors=tensors):
                return tensors.get(name) if optional else tensors[name]

            layer = checkpoint.method.read(get, checkpoint.config)
            layer.bias = None
            model.set_submodule(path, layer)
    return model


def train(model, steps=3):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        ids = torch.randint(model.config.vocab_size, (2, 8))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def run_export(adapter, base, output, to):
    export([f"--adapter={adapter}", f"--base_model={base}", f"--output_dir={output}", f"--to={to}"])


@every_kind
def test_what_was_trained_is_exported_to_the_bit(kind, tmp_path, capsys):
    to, _, read, _ = KINDS[kind]
    targets = TARGETS.get(kind, ["q_proj", "down_proj"])
    plain, quantised = bases(tmp_path, kind)
    config = dk.DoraConfig(r=3, lora_alpha=6, target_modules=targets, merge_aware=True)
    model = train(dk.apply_dora(in_format(plain, quantised, targets), config))
    dk.save_adapter(model, tmp_path / "adapter")
    run_export(tmp_path / "adapter", quantised, tmp_path / "out", to)
    printed = printed_errors(capsys.readouterr().out)
    served, before = load(plain), load(plain)
    layers = dora_layers(model)
    assert len(layers) == 4 and all(layer.merge_aware for layer in layers.values())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for path, layer in layers.items():
        found = read(of_layer(tensors, path))
        # FP4 and int4 are rounded to a dtype where they are decoded.
        assert torch.equal(found.to(layer.base_weight.dtype).float(), layer.merged_weight().float()) or kind == "fp8"
        assert torch.equal(found.float(), layer.merged_weight(torch.float32))
        assert not torch.equal(found, before.get_submodule(path).weight.double())
        assert printed[path] == 0
        served.get_submodule(path).weight.data = found.float()
    assert torch.equal(served(IDS).logits, model(IDS).logits)
    # In a dense checkpoint it is the same, rounded once.
    run_export(tmp_path / "adapter", quantised, tmp_path / "bf16", "bf16")
    dense = load_file(tmp_path / "bf16" / "model.safetensors")
    for path, layer in layers.items():
        assert torch.equal(dense[f"{path}.weight"], layer.merged_weight(torch.bfloat16))
    for name, tensor in dk.merged_weights(model):
        path, _, part = name.rpartition(".")
        if part == "weight" and path in layers:
            assert torch.equal(tensor, layers[path].merged_weight(tensor.dtype))


@pytest.mark.parametrize("form", ["pack-quantized", *map(slow, sorted(TO.keys() - {"pack-quantized"}))])
def test_from_the_command_line_to_what_the_library_loads(form, data, tmp_path):  # noqa: F811
    base, out = packed_base(tmp_path / "base", form), tmp_path / "out"
    run(data, out, "--merge_aware", base_model=base, val_set_size=0, eval_step=None, max_steps=3)
    assert json.loads((out / "adapter_config.json").read_text())["merge_aware"] is True
    if TO[form] == "fp4":  # which the library decodes to bf16
        fields = json.loads((base / "config.json").read_text()) | {"dtype": "bfloat16"}
        (base / "config.json").write_text(json.dumps(fields))
    model = Sources(out, str(base), may_be_quantised=True).load()
    layers = dora_layers(model)
    assert len(layers) == 7 and all(layer.merge_aware for layer in layers.values())
    run_export(out, base, tmp_path / "served", TO[form])
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served", dtype="auto")
    for path, layer in layers.items():
        found = by_the_library(served.get_submodule(path), form)
        assert torch.equal(found, layer.merged_weight(found.dtype)), path
        assert not torch.equal(found, layer.dense_base(found.dtype))
    assert torch.equal(served(IDS).logits, model(IDS).logits)


def test_in_nf4(folder, tmp_path):  # noqa: F811
    config = dk.DoraConfig(r=4, lora_alpha=8, merge_aware=True)
    model = train(dk.apply_dora(load_nf4(folder, torch.bfloat16), config))
    dk.save_adapter(model, tmp_path / "adapter")
    run_export(tmp_path / "adapter", folder, tmp_path / "out", "nf4")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    keep_packing(served)
    for path, layer in dora_layers(model).items():
        found = dk.DoraLinear.from_linear(served.get_submodule(path), r=1, lora_alpha=1).dense_base(torch.float32)
        assert torch.equal(found, layer.merged_weight(torch.float32)), path
        assert not torch.equal(found, layer.dense_base(torch.float32))
    assert torch.equal(served(IDS).logits, model(IDS).logits)
    merged = dk.merge_dora(model, base="requantized")
    assert torch.equal(served(IDS).logits, merged(IDS).logits)


def test_over_a_dense_base_in_bf16(tmp_path):
    plain = base_folder(tmp_path / "plain", dtype=torch.bfloat16)
    model = train(dk.apply_dora(load(plain, dtype=torch.bfloat16), dk.DoraConfig(r=3, merge_aware=True)))
    dk.save_adapter(model, tmp_path / "adapter")
    run_export(tmp_path / "adapter", plain, tmp_path / "out", "merged")
    served = load(tmp_path / "out", dtype=torch.bfloat16)
    for path, layer in dora_layers(model).items():
        assert torch.equal(served.get_submodule(path).weight, layer.merged_weight())
    assert torch.equal(served(IDS).logits, model(IDS).logits)


@pytest.fixture
def small(tmp_path):
    """A model in FP8, trained so, and its adapter's folder."""
    plain, quantised = bases(tmp_path, "fp8")

    def make(**options):
        config = dk.DoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], **options)
        torch.manual_seed(3)
        return dk.apply_dora(in_format(plain, quantised, ["q_proj", "down_proj"]), config)

    return make, tmp_path / "adapter"


def test_the_file_says_it_and_peft_passes_over_it(small, tmp_path):
    make, adapter = small
    model = train(make(merge_aware=True))
    dk.save_adapter(model, adapter, scales=True)
    again = dk.load_adapter(in_format(tmp_path / "plain", tmp_path / "quantised", ["q_proj", "down_proj"]), adapter)
    assert again.dora_config.merge_aware and torch.equal(again(IDS).logits, model(IDS).logits)
    dk.save_adapter(again, tmp_path / "again", scales=True)
    for file in adapter.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(load(tmp_path / "plain"), adapter)
    assert any("merge_aware" in str(warning.message) for warning in caught)
    assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())
    with pytest.warns(UserWarning, match=r"trained with merge_aware, and 4 layers of the model .* differ"):
        dk.load_adapter(make(), adapter)
    # A config that was changed is refused.
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(fields | {"merge_aware": False}))
    with pytest.raises(ValueError, match="is not the one that"):
        dk.load_adapter(load(tmp_path / "plain"), adapter)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["new", "reentrant"])
def test_checkpointed_training_is_the_same(use_reentrant, small):
    make, _ = small
    first, second = make(merge_aware=True), make(merge_aware=True)
    second.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    second.enable_input_require_grads()
    for model in (first, second):
        train(model.train())
    for (name, one), other in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(one, other), name


def test_micro_steps_and_inference_scopes_are_the_same(small):
    make, _ = small
    model = train(make(merge_aware=True))
    expected = model(IDS).logits
    with torch.no_grad(), dk.frozen_adapters(model):
        assert torch.equal(model(IDS).logits, expected)
    grads = []
    for scope in (False, True):
        model.train().zero_grad()
        with dk.accumulating(model) if scope else torch.enable_grad():
            for _ in range(2):
                model(IDS, labels=IDS).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *grads))


def test_explain_says_it(small):
    make, _ = small
    said = str(dk.explain(make(merge_aware=True).train(), tokens=8))
    assert said.count("merge_aware quantises the merged weight as it will be served") == 2
    assert "token space" not in said


def test_layers_without_a_format_are_refused_by_name(small):
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "embed": nn.Embedding(8, 4), "linear": nn.Linear(4, 4)})
    for name, kind in (("conv", "Conv1d"), ("embed", "Embedding")):
        with pytest.raises(ValueError, match=rf"{name} \({kind}\) is no linear layer, which merge_aware is for"):
            dk.apply_dora(model, dk.DoraConfig(target_modules=[name], merge_aware=True))
    assert not dora_layers(model)


def test_what_was_trained_serves_in_fp16_too(tmp_path):
    """Which cannot train it."""
    plain = base_folder(tmp_path / "plain", dtype=torch.bfloat16)
    model = train(dk.apply_dora(load(plain, dtype=torch.bfloat16), dk.DoraConfig(r=3, merge_aware=True)))
    dk.save_adapter(model, tmp_path / "adapter")
    served = dk.load_adapter(load(plain, dtype=torch.float16), tmp_path / "adapter").eval()
    with torch.no_grad():
        found = served(IDS).logits
        assert torch.equal(dk.merge_dora(served)(IDS).logits, found)


def test_the_command_line_refuses_it_with_peft(data, tmp_path):  # noqa: F811
    with pytest.raises(SystemExit, match="`--merge_aware` is for the engine's DoRA"):
        run(data, tmp_path / "out", "--merge_aware", "--use_peft")
    with pytest.raises(SystemExit, match="`--lora_dropout` drops the input"):
        run(data, tmp_path / "out", "--merge_aware", lora_dropout=0.1)
