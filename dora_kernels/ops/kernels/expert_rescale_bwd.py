"""The one pass over dy of tokens sorted by expert: each expert's dm and dB, and dZ = dy ⊙ g."""

import torch

from ..types import NormScale, Rounding
from .expert_sums import Needs, launch_finish, launch_sums
from .launch import contiguous


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
    """Twin of `reference.expert_rescale_bwd`."""
    (S, N), (E, _, R) = grad_y.shape, lora_B.shape
    acc, lora_B = norm_scale.scale.dtype, contiguous(lora_B)
    needs_magnitude, needs_B = magnitude_dtype is not None, B_dtype is not None
    from_base = needs_magnitude and saved_is == "base"

    def empty(needed, *shape, like):
        return torch.empty(shape, dtype=like, device=grad_y.device) if needed else None

    grad_magnitude = empty(needs_magnitude, E, N, like=magnitude_dtype)
    grad_B = empty(needs_B, E, N, R, like=B_dtype)
    grad_base = empty(needs_base, S, N, like=grad_y.dtype)
    needs = Needs(needs_magnitude, needs_B or from_base, needs_base)
    if any(needs):
        partials = launch_sums(
            grad_y, saved, h, norm_scale.scale, ends, needs,
            acc=acc, grad_base=grad_base, salt=rounding.salt, dithered=rounding.mode == "dithered",
        )  # fmt: skip
    if needs_magnitude or needs_B:
        launch_finish(
            partials, lora_B if from_base else None, norm_scale, scaling, ends,
            acc=acc, grad_magnitude=grad_magnitude, out=grad_B,
        )  # fmt: skip
    return grad_magnitude, grad_B, grad_base
