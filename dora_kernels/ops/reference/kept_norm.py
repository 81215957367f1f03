"""n and g as they were kept, where A, B and m are bit for bit those that they are of."""

import torch

from ..base_weights import Packed
from ..types import KeptNorm, NormScale
from .weight_norm import weight_norm

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element."""


def kept_norm(
    weight: torch.Tensor | Packed,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    kept: KeptNorm,
    *,
    into: NormScale | None = None,
) -> tuple[NormScale, torch.Tensor]:
    """n and g of W [N, K], A [R, K], B [N, R], m [N], to the bits of `weight_norm`; `kept` is of these factors from
    then on. Where A, B or m changed, they are computed anew. `into` takes the results. Beside them: int32, a number
    that is not 0 where one changed.
    """
    factors = lora_A, lora_B, magnitude
    # A device is not waited for: there, n is computed in any case.
    if weight.device.type == "cpu" and all(map(_same_bits, kept.factors, factors)):
        found = NormScale(*map(torch.empty_like, kept.norm_scale)) if into is None else into
        _copy(kept.norm_scale, found)
        return found, torch.zeros(1, dtype=torch.int32)
    found, _ = weight_norm(weight, *factors, scaling, into=into)
    _copy(factors, kept.factors)
    _copy(found, kept.norm_scale)
    return found, torch.ones(1, dtype=torch.int32, device=weight.device)


def _same_bits(kept: torch.Tensor, factor: torch.Tensor) -> bool:
    bits = BITS[kept.element_size()]
    return torch.equal(kept.view(bits), factor.detach().view(bits))


def _copy(sources, targets) -> None:
    for source, target in zip(sources, targets):
        target.copy_(source.detach())
