"""The one pass over a gated MLP's da: the gradients of gate and up, the sums of dm and dB, and a again."""

import torch

from ..chunked import row_chunks
from ..types import GluFactors, GluGradients, Rounding
from .activations import ACTIVATIONS
from .cast import scaled_cast
from .glu_fwd import outputs


def glu_bwd(
    grad_a: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    factors: GluFactors,
    bias: torch.Tensor | None,
    norm: torch.Tensor,
    *,
    space: str,
    activation: str,
    dtype: torch.dtype,
    roundings: tuple[Rounding, ...],
) -> GluGradients:
    """The gradients; those of B and m in `dtype`. `grad_a` [M, I] is written over with a, to the forward's bits.

    `gate`, `up` and `bias` are those of the forward, `norm` [2 I] is n.
    Token space: products' gradients dz = dy ⊙ g, dm = Σ dy ⊙ (z + s h Bᵀ) / n, dB = s dzᵀh, for dy of gate and of up.
    Weight space: dy itself, dm = Σ dy ⊙ x W'ᵀ / (g n), dB = s g ⊙ dyᵀh.

    `roundings` are those of s B, or s g ⊙ B, of both layers, or of the one that holds both. All other rounding is to
    nearest: dy is no number of the dtype before it, so that a g near 1 is not lost in dz.
    """
    acc, features = factors.scale.dtype, gate.shape[1]
    function, derivative = ACTIVATIONS[activation]
    grads = torch.empty(gate.shape[0], 2 * features, dtype=gate.dtype, device=gate.device)
    correlation = torch.zeros(2 * features, dtype=acc, device=gate.device)
    product = torch.zeros(2 * features, factors.lora_B[0].shape[1], dtype=acc, device=gate.device)
    in_token_space = space == "token"
    for rows in row_chunks(*gate.shape):
        gate_out, up_out = outputs(gate, up, factors if in_token_space else None, bias, rows)
        grad, activated = grad_a[rows].to(acc), function(gate_out).to(gate.dtype).to(acc)
        grads_out = grad * up_out * derivative(gate_out), grad * activated
        for index, (grad_out, y) in enumerate(zip(grads_out, (gate, up))):
            own = slice(index * features, (index + 1) * features)
            h, lora_B = factors.of(index)
            y, h = y[rows].to(acc), h[rows].to(acc)
            if in_token_space:
                y = y + factors.scaling * (h @ lora_B.to(acc).T)
            correlation[own] += (grad_out * y).sum(0)
            grads[rows, own] = grad_out * factors.scale[own] if in_token_space else grad_out
            product[own] += grads[rows, own].to(acc).T @ h
        grad_a[rows] = activated * up_out
    divisor = norm if in_token_space else factors.scale * norm
    # V is zero there: the same rule as in forward, no gradient passes.
    zero = norm < torch.finfo(acc).tiny
    grad_magnitude = torch.where(zero, torch.zeros_like(correlation), correlation / divisor)
    if not in_token_space:
        product *= factors.scale[:, None]
    grad_B, parts = (product * factors.scaling).to(dtype), len(roundings)
    lora_B = torch.cat(factors.lora_B)
    scales = [None] * parts if in_token_space else factors.scale.chunk(parts)
    scaled_B = [
        scaled_cast(own, gate.dtype, scale=scale, scaling=factors.scaling, rounding=rounding)
        for own, scale, rounding in zip(lora_B.chunk(parts), scales, roundings)
    ]
    return GluGradients(grads, grad_magnitude.to(dtype), grad_B, torch.cat(scaled_B))
