"""The token-space epilogue y = g ⊙ (z + s h Bᵀ) + b, with each token's own expert's g, B and b."""

import torch

from ..grouped import expert_rows
from ..types import Rounding
from .rescale_fwd import rescale_fwd


def expert_rescale_fwd(
    base_out: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    mag_norm_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    ends: torch.Tensor,
    *,
    in_place: bool,
    rounding: Rounding,
) -> torch.Tensor:
    """y [S, N] in `base_out`'s dtype from z = `base_out` [S, N], h [S, R], B [E, N, R], g [E, N], b [E, N].

    `in_place` may write y over z. An expert's tokens are rounded as a layer's of their own, with its number added to
    the salt.
    """
    out = base_out if in_place else torch.empty_like(base_out, memory_format=torch.contiguous_format)
    for e, rows in expert_rows(ends):
        own = rounding._replace(salt=rounding.salt + e)
        out[rows] = rescale_fwd(
            base_out[rows], h[rows], lora_B[e], mag_norm_scale[e], None if bias is None else bias[e], scaling,
            in_place=in_place, rounding=own,
        )  # fmt: skip
    return out
