"""The token-space epilogue y = g ⊙ (z + s h Bᵀ) + b."""

import torch

from ..chunked import row_chunks
from ..types import Rounding
from .rounding import round_to


def rescale_fwd(
    base_out: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    mag_norm_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    *,
    base_bias: torch.Tensor | None = None,
    undropped: torch.Tensor | None = None,
    in_place: bool,
    rounding: Rounding,
) -> torch.Tensor:
    """y [M, N] in `base_out`'s dtype from z = `base_out` [M, N], h [M, R], B [N, R], g [N], b [N].

    `in_place` writes y over z. `undropped` is PEFT's dropout: z is then the product of the dropped input, and
    y = undropped + (g − 1) ⊙ z + g ⊙ s h Bᵀ + b. `base_bias` [N] is a bias that `base_out` holds already: by the same
    formula, `base_out` being the undropped product and z what is left of it without the bias.
    """
    acc_dtype = mag_norm_scale.dtype
    out = base_out if in_place else torch.empty_like(base_out, memory_format=torch.contiguous_format)
    factor = lora_B.to(acc_dtype).T
    for rows in row_chunks(*base_out.shape):
        base = base_out[rows].to(acc_dtype)
        if undropped is None and base_bias is None:
            # Where z may be overwritten and is not read again, without a copy of it.
            product = base if in_place else base.clone()
            product.addmm_(h[rows].to(acc_dtype), factor, alpha=scaling).mul_(mag_norm_scale)
        else:
            # g = 1 and B = 0 leave no trace of z. Nothing is in place: selective checkpointing may keep a product.
            product = (h[rows].to(acc_dtype) @ factor) * (scaling * mag_norm_scale)
            product = product + (mag_norm_scale - 1) * (base if base_bias is None else base - base_bias)
            product = product + (base if undropped is None else undropped[rows].to(acc_dtype))
        if bias is not None:
            product += bias.to(acc_dtype)
        rounded = round_to(product, out.dtype, rounding, rows.start)
        # Else y stands in z's memory already.
        if rounded is not base:
            out[rows] = rounded
    return out
