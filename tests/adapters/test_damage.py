"""Adapters that are damaged or foreign never reach the model: each edit of a good one (r = 3) is named."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_kernels.adapters.save_load import load_adapter, save_adapter
from dora_kernels.config import DoraConfig
from dora_kernels.layers.frozen import frozen_adapters
from dora_kernels.models.apply import apply_dora
from dora_kernels.models.merge import merge_dora
from dora_kernels.models.modules import dora_layers
from tests.support.tiny_models import assert_unchanged, bert, llama, snapshot

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def edit_config(**fields):
    def edit(directory):
        values = json.loads((directory / CONFIG).read_text())
        values.update(fields)
        (directory / CONFIG).write_text(json.dumps(values))

    return edit


def without_config(*names):
    def edit(directory):
        values = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({k: v for k, v in values.items() if k not in names}))

    return edit


def config_text(text):
    return lambda directory: (directory / CONFIG).write_bytes(text)


def edit_tensors(change):
    def edit(directory):
        tensors = load_file(directory / WEIGHTS)
        save_file({k: v.contiguous() for k, v in change(tensors).items()}, directory / WEIGHTS)

    return edit


def map_tensors(part, function):
    return edit_tensors(lambda tensors: {k: function(v) if part in k else v for k, v in tensors.items()})


def rename(old, new):
    return edit_tensors(lambda tensors: {k.replace(old, new): v for k, v in tensors.items()})


def truncate(keep):
    def edit(directory):
        data = (directory / WEIGHTS).read_bytes()
        (directory / WEIGHTS).write_bytes(data[: int(len(data) * keep)])

    return edit


def flip_header_bit(directory):
    data = bytearray((directory / WEIGHTS).read_bytes())
    data[data.index(b"lora_A")] ^= 1
    (directory / WEIGHTS).write_bytes(bytes(data))


def with_value(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


def only_a_pickle(directory):
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")


DAMAGE = {
    "no directory": (shutil.rmtree, FileNotFoundError, "is not a directory"),
    "no config": (lambda d: (d / CONFIG).unlink(), FileNotFoundError, "Can't find 'adapter_config.json'"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), FileNotFoundError, "Can't find 'adapter_model.safetensors'"),
    "a pickle": (only_a_pickle, FileNotFoundError, "is a pickle"),
    "empty weights": (truncate(0), ValueError, "truncated or corrupt"),
    "half a header": (truncate(0.05), ValueError, "truncated or corrupt"),
    "half the weights": (truncate(0.5), ValueError, "truncated or corrupt"),
    "all but a byte": (truncate(0.99999), ValueError, "truncated or corrupt"),
    "not safetensors": (lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 64), ValueError, "truncated or corrupt"),
    "a flipped bit in a key": (flip_header_bit, ValueError, "missing keys: model.layers.*unexpected keys"),
    "empty config": (config_text(b""), ValueError, "not valid JSON"),
    "half a config": (config_text(b'{"r": 3, "lora'), ValueError, "not valid JSON"),
    "binary config": (config_text(b"\xff\xfe\x00"), ValueError, "not valid JSON"),
    "deep config": (config_text(b"[" * 200_000), ValueError, "not valid JSON"),
    "a list": (config_text(b"[]"), ValueError, "should hold a JSON object, got list"),
    "no peft_type": (without_config("peft_type"), ValueError, 'peft_type should be "LORA", got None'),
    "another method": (edit_config(peft_type="IA3"), ValueError, "got 'IA3': not a DoRA adapter"),
    "plain LoRA": (edit_config(use_dora=False), ValueError, "a plain LoRA adapter; load it with PEFT"),
    "no use_dora": (without_config("use_dora"), ValueError, "a plain LoRA adapter"),
    "no r": (without_config("r"), ValueError, "lacks r"),
    "no targets": (edit_config(target_modules=None), ValueError, "lacks target_modules"),
    "bias all": (edit_config(bias="all"), ValueError, "bias='all' is not supported"),
    "bias lora_only": (edit_config(bias="lora_only"), ValueError, "bias='lora_only' is not supported"),
    "pissa": (edit_config(init_lora_weights="pissa_niter_4"), ValueError, "pissa_niter_4' changed the base weights"),
    "layers_to_transform": (edit_config(layers_to_transform=[0]), ValueError, r"layers_to_transform=\[0\] leaves out"),
    "trainable tokens": (edit_config(trainable_token_indices=[1]), ValueError, "trainable_token_indices"),
    "target_parameters": (edit_config(target_parameters=["w"]), ValueError, r"Target parameters \['w'\] not found"),
    "layer_replication": (edit_config(layer_replication=[[0, 1]]), ValueError, "layer_replication"),
    "lora_bias": (edit_config(lora_bias=True), ValueError, "lora_bias=True"),
    "weight tying": (edit_config(ensure_weight_tying=True), ValueError, "ensure_weight_tying=True"),
    "a field of the future": (edit_config(use_hyperdora=True), ValueError, "unknown: use_hyperdora=True"),
    "r a string": (edit_config(r="3"), ValueError, "positive integer"),
    "r zero": (edit_config(r=0), ValueError, "positive integer"),
    "r huge": (edit_config(r=10**30), ValueError, "another rank"),
    "alpha NaN": (edit_config(lora_alpha=float("nan")), ValueError, "positive number"),
    "alpha huge": (edit_config(lora_alpha=10**400), ValueError, "positive number"),
    "targets a number": (edit_config(target_modules=7), ValueError, "list of module names"),
    "targets not a regex": (edit_config(target_modules="(q"), ValueError, "not a regular expression"),
    "targets absent": (edit_config(target_modules=["nope"]), ValueError, "not found in the base model"),
    "targets unsupported": (edit_config(target_modules=["input_layernorm"]), ValueError, "LlamaRMSNorm"),
    "another rank": (
        edit_config(r=4),
        ValueError,
        r"expected shape \[4, 32\], got \[3, 32\]: an adapter of another rank",
    ),
    "fewer targets": (
        edit_config(target_modules=["q_proj"]),
        ValueError,
        "unexpected keys: model.layers.0.self_attn.v_proj",
    ),
    "more targets": (edit_config(target_modules=["q_proj", "v_proj", "k_proj"]), ValueError, "missing keys: .*k_proj"),
    "no magnitudes": (
        edit_tensors(lambda tensors: {k: v for k, v in tensors.items() if "magnitude" not in k}),
        ValueError,
        "lacks magnitudes: model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    ),
    "no lora_B": (
        edit_tensors(lambda tensors: {k: v for k, v in tensors.items() if "lora_B" not in k}),
        ValueError,
        "missing keys: model.layers.0.self_attn.q_proj.lora_B.weight.*and 1 more; unexpected keys: none",
    ),
    "no tensor": (edit_tensors(lambda tensors: {}), ValueError, "missing keys"),
    "both spellings": (
        edit_tensors(lambda t: t | {f"{k}.weight": v.clone() for k, v in t.items() if "magnitude" in k}),
        ValueError,
        "lora_magnitude_vector twice",
    ),
    "embeddings of another vocabulary": (
        edit_tensors(lambda t: t | {"base_model.model.model.embed_tokens.weight": torch.zeros(62, 32)}),
        ValueError,
        r"resize_token_embeddings\(62\) first",
    ),
    "a parameter of the base that is not there": (
        edit_tensors(lambda t: t | {"base_model.model.model.norm.base_layer.bias": torch.zeros(32)}),
        ValueError,
        "norm.bias of the base model, and this model has no such",
    ),
    "another model class": (rename("model.model.model.", "model.model."), ValueError, "the model class"),
    "no prefix": (rename("base_model.model.", ""), ValueError, "expected keys that start with 'base_model.model.'"),
    "LyCORIS": (rename("lora_magnitude_vector", "dora_scale"), ValueError, "LyCORIS"),
    "another base, A": (
        map_tensors("lora_A", lambda t: t[:, :16]),
        ValueError,
        "got .3, 16.: an adapter of another base",
    ),
    "another base, B": (
        map_tensors("lora_B", lambda t: t[:7]),
        ValueError,
        r"got \[7, 3\]: an adapter of another base",
    ),
    "another base, m": (
        map_tensors("magnitude", lambda t: t[:7]),
        ValueError,
        r"got \[7\]: an adapter of another base",
    ),
    "A transposed": (map_tensors("lora_A", lambda t: t.T), ValueError, r"expected shape \[3, 32\], got \[32, 3\]"),
    "conv m": (map_tensors("magnitude", lambda t: t[None, :, None]), ValueError, "expected shape .32., got .1, 32, 1."),
    "integers": (map_tensors("lora_B", lambda t: t.int()), ValueError, "expected dtype torch.float32, got torch.int32"),
    "NaN in A": (map_tensors("lora_A", with_value(float("nan"))), ValueError, "lora_A.weight holds NaN or infinity"),
    "inf in B": (map_tensors("lora_B", with_value(float("inf"))), ValueError, "lora_B.weight holds NaN or infinity"),
    "NaN in m": (map_tensors("magnitude", with_value(float("nan"))), ValueError, "lora_magnitude_vector holds NaN"),
    "inf once fp32": (
        map_tensors("lora_B", lambda t: with_value(1e300)(t.double())),
        ValueError,
        "lora_B.weight holds NaN or infinity",
    ),
}


@pytest.fixture(scope="module")
def good_adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(apply_dora(llama(), DoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])), directory)
    return directory


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused_before_the_model_is_touched(damage, good_adapter, tmp_path):
    edit, error, message = DAMAGE[damage]
    directory = tmp_path / "adapter"
    shutil.copytree(good_adapter, directory)
    edit(directory)
    model = llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_adapter(model, directory)
    assert_unchanged(model, before)


def test_the_undamaged_one_loads(good_adapter):
    assert len(dora_layers(load_adapter(llama(), good_adapter))) == 4


def test_another_base_model_is_named_layer_by_layer(good_adapter):
    model = bert()
    with pytest.raises(ValueError, match="not found in the base model"):
        load_adapter(model, good_adapter)
    with pytest.raises(ValueError, match=r"unexpected keys: model\.layers\.1\.self_attn"):
        load_adapter(llama(layers=1), good_adapter)


def test_no_load_inside_frozen_adapters(good_adapter):
    model = load_adapter(llama(), good_adapter)
    with frozen_adapters(model), pytest.raises(RuntimeError, match="inside frozen_adapters"):
        load_adapter(model, good_adapter)


def test_models_that_take_no_adapter(good_adapter):
    with pytest.raises(ValueError, match="patch_peft"):
        load_adapter(
            peft.get_peft_model(llama(), peft.LoraConfig(use_dora=True, target_modules=["q_proj"])), good_adapter
        )
    with pytest.raises(ValueError, match="merged with keep_base=True"):
        load_adapter(merge_dora(load_adapter(llama(), good_adapter), keep_base=True), good_adapter)
    with pytest.raises(ValueError, match="meta device"):
        with torch.device("meta"):
            model = llama()
        load_adapter(model, good_adapter)


@pytest.mark.parametrize("compat", ["peft", "transformers"])
def test_a_flipped_bit_in_a_value_is_seen_in_files_of_our_own(compat, tmp_path):
    save_adapter(apply_dora(llama(), DoraConfig(r=3, target_modules=["q_proj"])), tmp_path, compat=compat)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-20] ^= 1  # of a mantissa: the number stays a number
    (tmp_path / WEIGHTS).write_bytes(content)
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="its tensors do not match their sha256"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    content[-20] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    load_adapter(model, tmp_path)


def test_the_config_of_another_adapter_is_seen(good_adapter, tmp_path):
    save_adapter(apply_dora(llama(), DoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"])), tmp_path)
    shutil.copy(good_adapter / CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"is not the one that adapter_model\.safetensors was saved with"):
        load_adapter(llama(), tmp_path)


def test_where_the_adapter_came_from_may_be_edited(good_adapter, tmp_path):
    shutil.copytree(good_adapter, tmp_path, dirs_exist_ok=True)
    edit_config(base_model_name_or_path="elsewhere", inference_mode=False)(tmp_path)
    load_adapter(llama(), tmp_path)
