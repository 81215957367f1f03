"""The blocks of transformers' families, and that they compute what is said of them."""

import pytest
import torch
import torch.nn.functional as F

from dora_kernels.layers.blocks_seen import Siblings
from dora_kernels.layers.gated_mlp_seen import GatedMlp
from dora_kernels.layers.probe import probe
from tests.support.families import tiny

SILU = GatedMlp("gate_proj", "up_proj", "down_proj", "silu")
GELU = SILU._replace(activation="gelu_tanh")
HALVES = GatedMlp("gate_up_proj", "gate_up_proj", "down_proj", "silu")
QKV = Siblings(("q_proj", "k_proj", "v_proj"))
LATENT = Siblings(("q_a_proj", "kv_a_proj_with_mqa"))
NO_GATE = "has no gate"
MLP, SELF_ATTENTION, SHARED = "model.layers.{}.mlp", "model.layers.{}.self_attn", "model.layers.{}.mlp.shared_expert"

FAMILIES = {
    "llama": ({MLP: SILU}, {SELF_ATTENTION: QKV}, {}),
    "mistral": ({MLP: SILU}, {SELF_ATTENTION: QKV}, {}),
    "qwen2": ({MLP: SILU}, {SELF_ATTENTION: QKV}, {}),
    "qwen3": ({MLP: SILU}, {SELF_ATTENTION: QKV}, {}),
    "cohere": ({MLP: SILU}, {SELF_ATTENTION: QKV}, {}),
    "olmo2": ({MLP: SILU}, {SELF_ATTENTION: QKV}, {}),
    "granite": ({MLP: SILU}, {SELF_ATTENTION: QKV}, {}),
    "gemma": ({MLP: GELU}, {SELF_ATTENTION: QKV}, {}),
    "gemma2": ({MLP: GELU}, {SELF_ATTENTION: QKV}, {}),
    "phi3": ({MLP: HALVES}, {}, {}),
    "glm": ({MLP: HALVES}, {SELF_ATTENTION: QKV}, {}),
    "glm4": ({MLP: HALVES}, {SELF_ATTENTION: QKV}, {}),
    "mixtral": ({}, {SELF_ATTENTION: QKV}, {}),
    "qwen2_moe": ({SHARED: SILU}, {SELF_ATTENTION: QKV}, {}),
    "deepseek_v3": (
        {"model.layers.0.mlp": SILU, "model.layers.1.mlp.shared_experts": SILU},
        {SELF_ATTENTION: LATENT},
        {},
    ),
    "starcoder2": ({}, {SELF_ATTENTION: QKV}, {MLP: NO_GATE}),
    "phi": ({}, {SELF_ATTENTION: QKV}, {MLP: NO_GATE}),
    "gpt2": ({}, {}, {"transformer.h.{}.mlp": NO_GATE}),
    "falcon": ({}, {}, {"transformer.h.{}.mlp": NO_GATE}),
    "bloom": ({}, {}, {"transformer.h.{}.mlp": NO_GATE}),
    "apertus": ({}, {SELF_ATTENTION: QKV}, {MLP: NO_GATE}),
    "bitnet": (
        {},
        {SELF_ATTENTION: QKV, MLP: Siblings(("gate_proj", "up_proj"))},
        {MLP: "activates by relu, not by silu or gelu_tanh"},
    ),
    "falcon_h1": (
        {},
        {SELF_ATTENTION: QKV, "model.layers.{}.feed_forward": Siblings(("up_proj", "gate_proj"))},
        {"model.layers.{}.feed_forward": "computes mul between its layers"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family):
    model = tiny(f"decoder {family}").model
    seen = probe(model)
    mlps, siblings, reasons = (
        {path.format(layer): found for path, found in of.items() for layer in (0, 1)} for of in FAMILIES[family]
    )
    assert seen[2:] == (None, mlps, {path: (group,) for path, group in siblings.items()}, reasons)
    for path, mlp in seen.mlps.items():
        block = model.get_submodule(path)
        x = torch.randn(2, 3, block.get_submodule(mlp.gate).in_features)
        with torch.no_grad():
            assert torch.equal(block(x), by_the_formula(block, mlp, x))


def by_the_formula(block, mlp, x):
    gate, up = (block.get_submodule(name)(x) for name in (mlp.gate, mlp.up))
    if mlp.gate == mlp.up:
        gate, up = gate.tensor_split(2, dim=-1)
    act = {"silu": F.silu, "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh")}[mlp.activation]
    return block.get_submodule(mlp.down)(act(gate) * up)
