"""a = act(gate) ⊙ up of tokens sorted by expert, with each token's own expert's g and B."""

from collections.abc import Iterator

import torch

from ..grouped import expert_rows
from ..types import GluFactors
from .glu_fwd import glu_fwd


def expert_glu_fwd(
    base_out: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    mag_norm_scale: torch.Tensor,
    scaling: float,
    ends: torch.Tensor,
    *,
    activation: str,
) -> torch.Tensor:
    """a [S, I] in `base_out`'s dtype from z = `base_out` [S, 2 I], h [S, R], B [E, 2 I, R] and g [E, 2 I].

    Of the 2 I features gate's stand before up's. g ⊙ (z + s h Bᵀ) is computed here, in fp32. Rounding is as in
    `glu_fwd`.
    """
    a = torch.empty(len(base_out), base_out.shape[1] // 2, dtype=base_out.dtype, device=base_out.device)
    for rows, factors in factors_of_experts(h, lora_B, mag_norm_scale, scaling, ends):
        a[rows] = glu_fwd(*base_out[rows].chunk(2, dim=1), factors, None, activation=activation)
    return a


def factors_of_experts(h, lora_B, mag_norm_scale, scaling, ends) -> Iterator[tuple[slice, GluFactors]]:
    """The rows of each expert that has tokens, and its gate's and up's factors."""
    for e, rows in expert_rows(ends):
        yield rows, GluFactors(h[rows], lora_B[e].chunk(2), mag_norm_scale[e], scaling)
