"""n and g of several layers of one input, one below the other."""

from collections.abc import Sequence

import torch

from ..types import Adapted, NormScale
from .weight_norm import weight_norm


def stacked_norm(
    layers: Sequence[Adapted], *, into: NormScale | None = None, A_into: torch.Tensor | None = None
) -> NormScale:
    """n and g [ΣN], each layer's as `weight_norm` gives them. `into` takes them, and `A_into` [ΣR, K] A in its dtype.

    Up to three layers with contiguous weights, of one rank, one scaling and one mode of rounding.
    """
    A_dtype = None if A_into is None else A_into.dtype
    norms, casts = zip(*(weight_norm(*layer[:5], A_dtype=A_dtype, rounding=layer.rounding) for layer in layers))
    if A_into is not None:
        torch.cat(casts, out=A_into)
    found = NormScale(*map(torch.cat, zip(*norms)))
    return found if into is None else NormScale(*(part.copy_(new) for part, new in zip(into, found)))
