"""Base models and trained DoRA adapters in folders, as training leaves them, and their update ΔW computed from the
files alone."""

import json
import math
import shutil

import peft
import torch
from safetensors.torch import load_file

import dora_kernels as dk
from dora_kernels.models.modules import dora_layers
from dora_kernels.models.targets import find_saved
from tests.support.peft_models import dora_config, trained
from tests.support.tiny_models import FAMILIES
from training import demo

PREFIX = "base_model.model."


def base_folder(folder, family="llama", dtype=torch.float32, **options):
    """A tiny model with a tokenizer."""
    FAMILIES[family](dtype, **options).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo.BASE / name, folder / name)
    return folder


def our_adapter(base, folder, family="llama", dtype=torch.float32, **options):
    """Written by `save_adapter`; returns the model that it was trained in."""
    model = dk.apply_dora(load(base, family, dtype), dk.DoraConfig(**{"r": 3, "lora_alpha": 6} | options))
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in dora_layers(model).values():
            layer.lora_B.normal_(std=0.1)
            layer.magnitude.mul_(1 + 0.1 * torch.randn_like(layer.magnitude))
        for module in find_saved(model, model.dora_config).values():
            module.weight.normal_()
    dk.save_adapter(model, folder)
    return model.eval()


def pefts_adapter(base, folder, family="llama", dtype=torch.float32, **options):
    """Written by PEFT; returns PEFT's model."""
    model = trained(peft.get_peft_model(load(base, family, dtype), dora_config(**options))).eval()
    model.save_pretrained(folder)
    return model


def load(folder, family="llama", dtype=torch.float32):
    return type(FAMILIES[family]()).from_pretrained(folder, dtype=dtype).eval()


def updates(base, adapter, transposed=False):
    """{path: W and ΔW = W' − W [out_features, in_features]} in fp64."""
    weights, tensors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = {}
    for key in tensors:
        if key.endswith("lora_A.weight"):
            path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            weight = weights[f"{path}.weight"].double()
            weight = weight.T if transposed else weight
            a, b = (tensors[f"{PREFIX}{path}.lora_{x}.weight"].double() for x in "AB")
            scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
            adapted = weight + scaling * b @ a
            magnitude = tensors[f"{PREFIX}{path}.lora_magnitude_vector"].double()
            found[path] = weight, magnitude[:, None] * adapted / adapted.norm(dim=1, keepdim=True) - weight
    return found


def printed_errors(text):
    """The table that the commands print, by path, with `total`."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: float(row[1]) for row in rows if len(row) == 2 and (row[0] == "total" or "." in row[0])}
