"""W' of several layers of one input, one below the other."""

from collections.abc import Sequence

import torch

from ..types import Adapted, NormScale
from .cast import scaled_cast
from .merge import merge
from .stacked_norm import stacked_norm


def stacked_merge(
    layers: Sequence[Adapted],
    *,
    dtype: torch.dtype,
    norm_scale: NormScale | None = None,
    into: NormScale | None = None,
    A_into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, NormScale]:
    """W' [ΣN, K] in `dtype`, and n and g [ΣN], each layer's as `merge` gives them.

    With `norm_scale` given no norm is computed again. `into` takes n and g, and `A_into` [ΣR, K] A in its dtype. See
    `stacked_norm` for the layers.
    """
    if A_into is not None:
        casts = [scaled_cast(layer.lora_A, A_into.dtype, rounding=layer.rounding) for layer in layers]
        torch.cat(casts, out=A_into)
    norms = stacked_norm(layers, into=into) if norm_scale is None else norm_scale
    merged, start = [], 0
    for layer in layers:
        rows = slice(start, start + len(layer.weight))
        own = NormScale(*(part[rows] for part in norms))
        merged.append(merge(*layer[:5], dtype=dtype, rounding=layer.rounding, norm_scale=own)[0])
        start = rows.stop
    return torch.cat(merged), norms
