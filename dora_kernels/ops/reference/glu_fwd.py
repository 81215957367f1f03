"""a = act(gate) ⊙ up of a gated MLP, whose gate and up are DoRA layers: their outputs are never stored."""

import torch

from ..chunked import row_chunks
from ..types import GluFactors
from .activations import ACTIVATIONS


def glu_fwd(
    gate: torch.Tensor,
    up: torch.Tensor,
    factors: GluFactors | None,
    bias: torch.Tensor | None,
    *,
    activation: str,
) -> torch.Tensor:
    """a [M, I] in `gate`'s dtype.

    Token space: `gate` and `up` [M, I] are z = x Wᵀ, and g ⊙ (z + s h Bᵀ) + b is computed here, in fp32. Weight space
    (`factors` is None): they are x W'ᵀ. `bias` [2 I] is gate's beside up's.

    act(gate) is rounded before the product, and a after it, both to nearest, as a model does that stores them: a fresh
    adapter leaves the model's bits.
    """
    a = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for rows in row_chunks(*gate.shape):
        gate_out, up_out = outputs(gate, up, factors, bias, rows)
        activated = ACTIVATIONS[activation].function(gate_out).to(a.dtype)
        a[rows] = activated * up_out
    return a


def outputs(
    gate: torch.Tensor, up: torch.Tensor, factors: GluFactors | None, bias: torch.Tensor | None, rows: slice
) -> list[torch.Tensor]:
    """What both layers return for some tokens, in fp32, or fp64 for fp64."""
    found, features, acc = [], gate.shape[1], torch.promote_types(gate.dtype, torch.float32)
    for index, product in enumerate((gate, up)):
        y, own = product[rows].to(acc), slice(index * features, (index + 1) * features)
        if factors is not None:
            h, lora_B = factors.of(index)
            y = factors.scale[own] * (y + factors.scaling * (h[rows].to(acc) @ lora_B.to(acc).T))
        found.append(y if bias is None else y + bias[own].to(acc))
    return found
