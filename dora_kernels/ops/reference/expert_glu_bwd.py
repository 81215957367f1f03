"""The gradients of what gate and up return, of da and of tokens sorted by expert."""

import torch

from ..chunked import row_chunks
from .activations import ACTIVATIONS
from .expert_glu_fwd import factors_of_experts
from .glu_fwd import outputs


def expert_glu_bwd(
    grad_a: torch.Tensor,
    base_out: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    mag_norm_scale: torch.Tensor,
    scaling: float,
    ends: torch.Tensor,
    *,
    activation: str,
) -> torch.Tensor:
    """dy [S, 2 I] in `base_out`'s dtype, rounded to nearest; the other arguments are those of the forward."""
    function, derivative = ACTIVATIONS[activation]
    features = grad_a.shape[1]
    grads = torch.empty(base_out.shape, dtype=base_out.dtype, device=base_out.device)
    for rows, factors in factors_of_experts(h, lora_B, mag_norm_scale, scaling, ends):
        gate, up = base_out[rows].chunk(2, dim=1)
        for some in row_chunks(*gate.shape):
            gate_out, up_out = outputs(gate, up, factors, None, some)
            grad, own = grad_a[rows][some].to(gate_out.dtype), grads[rows][some]
            own[:, :features] = grad * up_out * derivative(gate_out)
            own[:, features:] = grad * function(gate_out).to(base_out.dtype)
    return grads
