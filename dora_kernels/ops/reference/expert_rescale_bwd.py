"""The one pass over dy of tokens sorted by expert: each expert's dm and dB, and dZ = dy ⊙ g for token space."""

import torch

from ..grouped import expert_rows
from ..types import NormScale, Rounding
from .rescale_bwd import rescale_bwd


def expert_rescale_bwd(
    grad_y: torch.Tensor,
    saved: torch.Tensor | None,
    h: torch.Tensor | None,
    lora_B: torch.Tensor,
    norm_scale: NormScale,
    scaling: float,
    ends: torch.Tensor,
    *,
    saved_is: str,
    magnitude_dtype: torch.dtype | None,
    B_dtype: torch.dtype | None,
    needs_base: bool,
    rounding: Rounding,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dm [E, N] and dB [E, N, R], in the dtype asked for, and dZ [S, N] in `grad_y`'s; None where none is asked.

    `saved` [S, N] is as in `rescale_bwd`. Experts without tokens get zeros.
    """
    options = {"device": grad_y.device}
    grad_magnitude = grad_B = grad_base = None
    if magnitude_dtype is not None:
        grad_magnitude = torch.zeros(norm_scale.norm.shape, dtype=magnitude_dtype, **options)
    if B_dtype is not None:
        grad_B = torch.zeros(lora_B.shape, dtype=B_dtype, **options)
    if needs_base:
        grad_base = torch.empty(grad_y.shape, dtype=grad_y.dtype, **options)
    for e, rows in expert_rows(ends):
        own = rounding._replace(salt=rounding.salt + e)
        parts = rescale_bwd(
            grad_y[rows], None if saved is None else saved[rows], None if h is None else h[rows], lora_B[e],
            NormScale(norm_scale.norm[e], norm_scale.scale[e]), scaling,
            saved_is=saved_is, magnitude_dtype=magnitude_dtype, B_dtype=B_dtype, bias_dtype=None,
            needs_base=needs_base, rounding=own,
        )  # fmt: skip
        for out, at, part in ((grad_magnitude, e, parts[0]), (grad_B, e, parts[1]), (grad_base, rows, parts[3])):
            if out is not None:
                out[at] = part
    return grad_magnitude, grad_B, grad_base
