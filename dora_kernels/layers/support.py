"""Why a linear layer cannot be adapted: what its weight is, what wraps its forward, or what the model does with it."""

import sys
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor  # tracing and counting: no other weight's stand-in
from transformers.pytorch_utils import Conv1D

from ..ops.base_weights import is_quantized, sharding_of, weight_of, wrapped_forward

LINEAR_CLASSES = (nn.Linear, Conv1D)
REMEDY = "load the model without cpu or disk in its device_map"


def why_not(module: nn.Module, *, classes: tuple[type, ...] = LINEAR_CLASSES, kept: bool = False) -> str | None:
    """Why the engine cannot compute in the layer's place, as what follows "the layer …"; None if it can.

    Args:
        classes: the classes whose forward the engine computes. A layer quantised by a known library always qualifies.
        kept: the layer stays, below PEFT's, and its forward runs whenever a call is not fused. Else a `DoraLinear`
            takes its place, its parameters and accelerate's hook, and freezes its weight.
    """
    if is_quantized(module):
        try:
            weight_of(module)
        except ValueError as error:
            return f"cannot be read: {error}"
        return why_wrapped(module, kept)
    return why_not_class(module, classes) or why_not_weight(module, kept) or why_wrapped(module, kept)


def why_not_class(module: nn.Module, classes: tuple[type, ...] = LINEAR_CLASSES) -> str | None:
    """Why a layer of this class computes something else than x Wᵀ + b, or the model may not call it; None if not."""
    if is_quantized(module):
        return None
    if not isinstance(module, classes):
        return "is not a linear layer"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "is not always called: MultiheadAttention reads its weight"
    inherited = any(type(module).forward is cls.forward for cls in classes)
    if not inherited and not (isinstance(module, nn.Linear) and _computes_linear(type(module), *_settings(module))):
        return "has a forward of its own"
    return None


PLAIN = (bool, int, float, str, type(None))
"""The settings of a layer that can be compared: an object of its own may change what forward computes."""


@cache
def _computes_linear(cls: type[nn.Linear], *settings: tuple[str, object]) -> bool:
    """Whether a small new layer of the class computes x Wᵀ + b in both modes, with the same settings as the layer."""
    generator = torch.Generator().manual_seed(0)
    try:
        layer = cls(5, 3).float()
        if _settings(layer) != settings:
            return False
        x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 4, 5), (3, 5), (3,)))
        for with_bias in (True, False):
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.bias = nn.Parameter(bias) if with_bias else None
                expected = F.linear(x, weight, bias if with_bias else None)
                # A rounding apart: the sum may start from the bias, or end with it.
                if not all(torch.allclose(layer.train(mode)(x), expected, 1e-5, 1e-5) for mode in (True, False)):
                    return False
    except Exception:  # Its constructor asks for more, or its forward for another input.
        return False
    return True


def _settings(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """What a layer carries beside its parameters and sizes."""
    known = {*vars(nn.Linear(1, 1)), "_is_hf_initialized", "_hf_hook", "forward", "_old_forward"}
    extra = {name: value for name, value in vars(module).items() if name not in known}
    plain = all(isinstance(value, PLAIN) for value in extra.values())
    return tuple(sorted(extra.items())) if plain else (("objects", True),)


def why_not_format(module: nn.Module, kept: bool = False) -> str | None:
    """Why the layer's weight is no matrix of numbers known here: computed, sharded, or of an unknown type or dtype."""
    # The replicas of nn.DataParallel hold theirs as a plain attribute.
    weight = module._parameters.get("weight", vars(module).get("weight") if kept else None)
    if weight is None:
        return "computes its weight (a parametrization)"
    if sharding := sharding_of(weight):
        return f"has a weight that is {sharding}"
    # FSDP puts views of its flat parameter, plain tensors, in the weights' place.
    if type(weight) not in (nn.Parameter, FakeTensor) and not (kept and type(weight) is torch.Tensor):
        return f"has a weight of type {type(weight).__name__}: sharded weights and unknown formats are not supported"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"has a weight of dtype {weight.dtype}, of no quantisation known here"
    return None


def why_not_weight(module: nn.Module, kept: bool, ndim: int = 2) -> str | None:
    """Why the layer's weight cannot be read as one of `ndim` dimensions, or not be frozen; `kept` as in `why_not`."""
    if reason := why_not_format(module, kept):
        return reason
    weight = module.weight
    if kept and weight.is_meta:
        return "has its weight on the meta device or offloaded: load it first"
    if weight.ndim != ndim or weight.numel() == 0:
        return f"has a weight of shape {list(weight.shape)}: gather a sharded weight first"
    if kept and weight.requires_grad:
        return "has a weight that is trained"
    return None


def why_wrapped(module: nn.Module, kept: bool) -> str | None:
    """Why calling the layer does more than its class's forward, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks" if kept else "has hooks, which would be lost: register them after apply_dora"
    if (
        "forward" in vars(module)
        and not wrapped_forward(module)
        and not (_only_moves_inputs(module) if kept else hasattr(module, "_hf_hook"))
    ):
        return "had its forward replaced"
    return None


def _only_moves_inputs(module: nn.Module) -> bool:
    """Whether the layer's forward is wrapped by accelerate's hook of a `device_map` without offloading."""
    return not any(getattr(part, "offload", True) for part in _hooks_of_accelerate(module))


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate's brings the module's weights for each forward and takes them away again."""
    return any(getattr(part, "offload", False) for part in _hooks_of_accelerate(module))


def _hooks_of_accelerate(module: nn.Module) -> tuple:
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


def check_weights_loaded(module: nn.Module, act: str) -> None:
    """Raises ValueError if a weight of the module is on the meta device: offloaded, or never loaded."""
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(f"cannot {act}: weights of a DoRA layer are offloaded or on the meta device; {REMEDY}")


_MAMBA = frozenset({"falcon_mamba", "mamba"})
_FUSED = {
    "dt_proj": _MAMBA,
    "out_proj": _MAMBA | {"bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"},
    "x_proj": _MAMBA,
}
"""By a layer's own name, the model types of transformers that hand its weight to a fused Mamba kernel on a GPU.

A probe needs no GPU, and sees them call the layer."""

# What DoRA layers keep for dm and Liger's kernels write over, by the layer's own name.
_SWIGLU, _ROPE = (
    ("gate_proj", "up_proj", "w1", "w3", "gate_up_proj"),
    ("q_proj", "k_proj", "qkv_proj", "query_key_value"),
)


def why_not_called(model: nn.Module, path: str) -> str | None:
    """Why an adapter at `path` would do nothing in a fused kernel, which reads the layer's weight. Else None."""
    parent, name = _split(model, path)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _FUSED.get(name, ()):
        return f"is not always called: {kind}'s fused kernels read its weight"
    # Nor does a probe see these: PyTorch's fast path is off while it watches.
    if isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
        return f"is not always called: {type(parent).__name__}'s fused inference reads its weight"
    return None


def why_overwritten(model: nn.Module, path: str) -> str | None:
    """Why the magnitude's gradient at `path` would be wrong: Liger's kernels overwrite the layer's output. Else None.

    They write through raw pointers, which autograd's version check does not see.
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
