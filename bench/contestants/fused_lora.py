"""PEFT's LoRA run by the fused functions of Axolotl or Unsloth: a gated MLP, q|k|v and the attention's output are one
function each.

The functions are the libraries' own, and read the parameters of PEFT's own layers. Only the way to them is ours: in
training both libraries put a forward of theirs in the place of the attention's.
"""

import copy
import importlib
from functools import partial
from types import SimpleNamespace

from torch import nn

MODULES = {"Axolotl": "axolotl.kernels.lora", "Unsloth": "unsloth.kernels.fast_lora"}
MLP = ("apply_lora_mlp_swiglu", "gate_proj", "up_proj", "down_proj")
QKV = ("apply_lora_qkv", "q_proj", "k_proj", "v_proj")
OUTPUT = ("apply_lora_o", "o_proj")


def why_missing(library: str) -> str | None:
    """Why its functions cannot be imported; None if they can."""
    try:
        module = importlib.import_module(MODULES[library])
        for function, *_ in (MLP, QKV, OUTPUT):
            getattr(module, function)
    except Exception as error:  # Whatever a library raises on import: it is a row less.
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
    return None


def installed() -> list[str]:
    """The libraries that have rows."""
    return [library for library in MODULES if why_missing(library) is None]


def remarks() -> list[str]:
    """Lines on the libraries that have no rows, and on what Unsloth's import does to all others'."""
    missing = {library: why_missing(library) for library in MODULES}
    lines = [f"{library} LoRA: left out; {reason}" for library, reason in missing.items() if reason]
    if missing["Unsloth"] is None:
        lines.append("Unsloth LoRA: its import patches transformers and torch.compile under all rows from here on")
    return lines


def fuse_decoder(model: nn.Module, library: str) -> nn.Module:
    """PEFT's model of a Llama, with the layers of each decoder layer run by the library."""
    for layer in model.get_base_model().model.layers:
        fuse_mlp(layer.mlp, library)
        fuse_qkv(layer.self_attn, library)
        fuse_output(layer.self_attn, library)
    return model


def fuse_mlp(mlp: nn.Module, library: str, **options) -> None:
    """Makes the function the MLP's forward. `options` are the function's."""
    mlp.forward = _function(mlp, library, *MLP, **options)


def fuse_qkv(attention: nn.Module, library: str, **options) -> None:
    """Lets q_proj compute all three, of which k_proj and v_proj hand out theirs when they are called next."""
    apply, waiting = _function(attention, library, *QKV, **options), {}

    def first(x):
        q, waiting["k_proj"], waiting["v_proj"] = apply(x)
        return q

    attention.q_proj.forward = first
    attention.k_proj.forward = lambda x: waiting.pop("k_proj")
    attention.v_proj.forward = lambda x: waiting.pop("v_proj")


def fuse_output(attention: nn.Module, library: str) -> None:
    """Makes the function o_proj's forward."""
    attention.o_proj.forward = _function(attention, library, *OUTPUT)


def _function(block: nn.Module, library: str, function: str, *names: str, **options):
    """The library's function of x [batch, sequence, K], of the block's layers of these names."""
    layers = {name: _without_forward(getattr(block, name), library, name) for name in names}
    if library == "Unsloth" and (biased := [name for name in names if layers[name].base_layer.bias is not None]):
        raise NotImplementedError(f"Unsloth leaves layers with a bias to PEFT: {', '.join(biased)}")
    apply = getattr(importlib.import_module(MODULES[library]), function)
    # Both libraries look at `training` for dropout alone, which no contestant has.
    return partial(apply, SimpleNamespace(training=True, **layers), **options)


def _without_forward(layer: nn.Module, library: str, name: str) -> nn.Module:
    """The layer with the same parameters, which refuses to run: Unsloth hands to PEFT what it does not fuse, and the
    row would time PEFT under its name."""

    def forward(*args, **kwargs):
        raise RuntimeError(f"{library} left {name} to PEFT")

    shadow = copy.copy(layer)
    shadow.forward = forward
    return shadow
