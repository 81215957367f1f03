"""Adapters of fused experts on disk: PEFT's layout of A and B, our m beside them, and what does not fit."""

import json

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dora_kernels as dk
from dora_kernels.layers.experts import adapted_experts
from tests.models.test_experts import adapted, config
from tests.support.oracle import relative_error
from tests.support.tiny_experts import BATCH, tiny_experts
from tests.tolerances import SAME_FP32

FACTORS = ("lora_A", "lora_B", "magnitude")
PEFT_ALONE = "PEFT has no DoRA for stacks of experts and cannot load this adapter"


@pytest.fixture
def saved(tmp_path, request):
    model = adapted(getattr(request, "param", "Mixtral"), torch.float32)
    with pytest.warns(UserWarning, match=PEFT_ALONE):
        dk.save_adapter(model, tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("saved", ["Mixtral", "gpt-oss"], indirect=True)
def test_peft_reads_a_and_b_as_its_own_lora(saved, tmp_path_factory):
    """Without m the file is PEFT's expert LoRA, whose deltas are s B A of each expert in the parameter's layout."""
    model, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text()) | {"use_dora": False}
    lora = tmp_path_factory.mktemp("lora")
    (lora / "adapter_config.json").write_text(json.dumps(fields))
    save_file({key: t for key, t in tensors.items() if "magnitude" not in key}, lora / "adapter_model.safetensors")
    base = tiny_experts("gpt-oss" if model.config.model_type == "gpt_oss" else "Mixtral")
    loaded = peft.PeftModel.from_pretrained(base, lora).base_model.model
    wrappers = {}
    for path, module in loaded.named_modules():
        if type(module).__name__ == "ParamWrapper":
            wrappers[f"{path.replace('.base_layer', '')}.{module.parameter_name}"] = module
    assert wrappers.keys() == adapted_experts(model).keys()
    for name, adapter in adapted_experts(model).items():
        delta = wrappers[name].get_delta_weight("default")
        expected = adapter.scaling * adapter.lora_B @ adapter.lora_A
        expected = expected.mT if adapter.experts.is_transposed else expected
        assert relative_error(delta, expected.detach()) <= SAME_FP32


def test_the_round_trip_is_exact(saved):
    model, folder = saved
    plain = dk.load_adapter(tiny_experts("Mixtral", torch.float32), folder)
    patched = dk.load_adapter(dk.apply_dora(tiny_experts("Mixtral", torch.float32), config()), folder)
    for loaded in (plain, patched):
        for name, adapter in adapted_experts(loaded).items():
            for factor in FACTORS:
                assert torch.equal(getattr(adapter, factor), getattr(adapted_experts(model)[name], factor))
        assert torch.equal(loaded(BATCH).logits, model(BATCH).logits)


def test_a_divided_rank_comes_back_from_the_file(tmp_path):
    """PEFT reads it too: the file's `rank_pattern` says it."""
    options = {"r": 4, "target_modules": ["q_proj"], "expert_rank": "active", "rank_pattern": {"1.self_attn.q_proj": 5}}
    model = adapted("Mixtral", torch.float32, **options)
    with pytest.warns(UserWarning, match=PEFT_ALONE):
        dk.save_adapter(model, tmp_path)
    plain = dk.load_adapter(tiny_experts("Mixtral", torch.float32), tmp_path)
    patched = dk.load_adapter(dk.apply_dora(tiny_experts("Mixtral", torch.float32), config(**options)), tmp_path)
    for loaded in (plain, patched):
        assert {adapter.lora_A.shape[1] for adapter in adapted_experts(loaded).values()} == {2}
        assert torch.equal(loaded(BATCH).logits, model(BATCH).logits)
    fields = json.loads((tmp_path / "adapter_config.json").read_text()) | {"use_dora": False}
    lora = peft.get_peft_model(tiny_experts("Mixtral", torch.float32), peft.LoraConfig(**fields))
    ours = {key: list(tensor.shape) for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    theirs = {key: list(tensor.shape) for key, tensor in peft.get_peft_model_state_dict(lora).items()}
    assert {key: shape for key, shape in ours.items() if "magnitude" not in key} == theirs
    with pytest.raises(ValueError, match="adapter of another rank"):
        dk.load_adapter(adapted("Mixtral", torch.float32, r=4, target_modules=["q_proj"]), tmp_path)


def test_the_metadata_says_where_m_is(saved):
    _, folder = saved
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert "[experts, out_features]" in file.metadata()["dora_kernels.expert_magnitude"]
        prefix = "base_model.model.model.layers.0.mlp.experts"
        assert list(file.get_tensor(f"{prefix}.lora_magnitude_vector").shape) == [4, 16]
        assert list(file.get_tensor(f"{prefix}.base_layer.lora_magnitude_vector").shape) == [4, 48]


def test_what_does_not_fit_is_refused_and_nothing_changes(saved):
    _, folder = saved
    other = dk.apply_dora(tiny_experts("Mixtral", torch.float32), config(r=2))
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(
        ValueError,
        match=r"base_layer.lora_A.weight: expected shape \[8, 16\], got \[12, 16\]: an adapter of another rank",
    ):
        dk.load_adapter(other, folder)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    plain = tiny_experts("Qwen3-MoE", torch.float32)
    with pytest.raises(ValueError, match="expected shape"):
        dk.load_adapter(plain, folder)
    assert not adapted_experts(plain)


def test_a_diverged_expert_is_not_saved(tmp_path):
    model = adapted("Mixtral", torch.float32)
    name, adapter = next(iter(adapted_experts(model).items()))
    with torch.no_grad():
        adapter.lora_B[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{name}.lora_B holds NaN"):
        dk.save_adapter(model, tmp_path)
