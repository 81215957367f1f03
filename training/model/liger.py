"""Liger's fused linear cross-entropy on a model with DoRA layers: the logits of all tokens never exist at once.

Liger's other kernels stay off. Its SwiGLU overwrites the outputs of gate_proj and up_proj with gradients, and its
rotary embedding overwrites those of q_proj and k_proj. DoRA layers keep their outputs for the magnitude's gradient,
which would be silently wrong. transformers' `use_liger_kernel=True` turns both kernels on.
"""

from importlib.util import find_spec

import triton
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

import dora_kernels as dk

# Every kernel that Liger turns on by default is off but one. Liger ignores names that a model does not have.
FUSED_LOSS_ONLY = {
    "rope": False,
    "swiglu": False,
    "geglu": False,
    "rms_norm": False,
    "layer_norm": False,
    "cross_entropy": False,
    "fused_linear_cross_entropy": True,
}


def use_fused_loss(model: PreTrainedModel) -> None:
    """Patch this model: in training mode `model(..., labels=labels).loss` comes from Liger, without logits.

    Call it after the adapter is added; for a PEFT model, with `get_base_model()`. A head in `modules_to_save` still
    trains.

    Raises:
        ValueError: Liger is not installed or does not know the model, there is no GPU to run it, or the head is neither
            a plain linear layer nor a `DoraLinear`, or has a bias. Liger multiplies by `lm_head.weight`: of a
            `DoraLinear` that is its merged weight, and of PEFT's layers the base layer's.
    """
    if find_spec("liger_kernel") is None:
        raise ValueError("Liger's fused loss needs liger_kernel: pip install liger-kernel")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"Liger's fused loss needs a transformers model, got {type(model).__name__}")
    if model.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"Liger's fused loss needs a CUDA device, but the model is on {model.device}")
    head = model.get_output_embeddings()
    is_linear = type(head) is nn.Linear or isinstance(head, dk.DoraLinear)
    if not is_linear or head.bias is not None:
        kind = "a linear layer with a bias" if is_linear else type(head).__name__
        raise ValueError(
            f"Liger's fused loss reads the head's weight alone, but the head is {kind}: leave it out of the targets, "
            "or do without the fused loss"
        )
    before = model.forward
    apply_liger_kernel(model, FUSED_LOSS_ONLY)
    if model.forward == before:
        raise ValueError(f"Liger has no fused loss for model type {model.config.model_type!r}")
