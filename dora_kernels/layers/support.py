"""Layers that must not be adapted: their weight is offloaded, the model reads it directly, or Liger's kernels overwrite
their output."""

import sys

from torch import nn

REMEDY = "load the model without cpu or disk in its device_map"


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate's brings the module's weights for each forward and takes them away again."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))


def refuse_absent(module: nn.Module, act: str) -> None:
    """Raises ValueError if a weight of the module is not there."""
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(f"cannot {act}: weights of a DoRA layer are offloaded or on the meta device; {REMEDY}")


_MAMBA = frozenset({"falcon_mamba", "mamba"})
_READ_PAST_FORWARD = {
    "dt_proj": _MAMBA | {"jamba"},
    "out_proj": _MAMBA | {"bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "wavlm", "zamba2"},
    "x_proj": _MAMBA,
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), frozenset({"wavlm"})),
}
"""By a layer's own name, the model types of transformers that read its weight instead of calling it: Mamba-like models
hand it to a fused kernel, some only on a GPU, WavLM to PyTorch's attention function."""

# What DoRA layers keep for dm and Liger's kernels write over, by the layer's own name.
_SWIGLU, _ROPE = (
    ("gate_proj", "up_proj", "w1", "w3", "gate_up_proj"),
    ("q_proj", "k_proj", "qkv_proj", "query_key_value"),
)


def why_read_past(model: nn.Module, path: str) -> str | None:
    """Why an adapter at `path` would do nothing, as its layer is not always called, or None."""
    parent, name = _split(model, path)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _READ_PAST_FORWARD.get(name, ()):
        return f"is read by {kind}'s attention or Mamba kernels, past its forward"
    if isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
        return f"is read past its forward by {type(parent).__name__}'s fused inference"
    return None


def why_overwritten(model: nn.Module, path: str) -> str | None:
    """Why the magnitude's gradient at `path` would be wrong, as Liger's kernels write over the layer's output, or None.

    They write through raw pointers, past autograd's check of versions.
    """
    parent, name = _split(model, path)
    forward = vars(parent).get("forward", type(parent).forward)
    if name in _SWIGLU and _is_liger(forward):
        return "is overwritten by Liger's SwiGLU or GeGLU, which spoils the magnitude's gradient; leave these off"
    rope = getattr(sys.modules.get(type(parent).__module__), "apply_rotary_pos_emb", None)
    if name in _ROPE and _is_liger(rope):
        return "is overwritten by Liger's rotary embedding, which spoils the magnitude's gradient; leave it off"
    return None


def _split(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _is_liger(function) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("liger_kernel.")
