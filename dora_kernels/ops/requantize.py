"""A matrix in the format of a packed weight: scales and zeros stay, and each code becomes the nearest.

So W itself comes back to the last bit, and an element never errs by more than it changed: ‖Q(W') − W'‖ ≤ ‖W' − W‖.
Scales computed anew would round every weight once more, which costs far more than a fine-tune's update.
"""

import torch

from .base_weights import Fp4Weight, Fp8Weight, Int4Weight, Nf4Weight, Packed
from .base_weights.fp4 import VALUES
from .base_weights.int4 import packed_words
from .dispatch import dense_weight


@torch.no_grad()
def requantized(weight: Packed, matrix: torch.Tensor) -> Packed:
    """The weight with the codes nearest to `matrix` [N, K]; what lies beyond a block's range becomes its end.

    Raises:
        ValueError: `matrix` has another shape, or holds NaN or infinity.
    """
    if matrix.shape != weight.shape:
        raise ValueError(f"matrix should be {list(weight.shape)}, as the packed weight, got {list(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise ValueError("matrix holds NaN or infinity, which the packed weight's format cannot")
    return ENCODERS[type(weight)](weight, matrix.to(weight.device, torch.float32))


def _fp8(weight: Fp8Weight, matrix: torch.Tensor) -> Fp8Weight:
    ones = torch.ones_like(weight.codes, dtype=torch.float32).to(weight.codes.dtype)
    scales = dense_weight(weight._replace(codes=ones), torch.float32)
    most = torch.finfo(weight.codes.dtype).max
    return weight._replace(codes=_divided(matrix, scales).clamp(-most, most).to(weight.codes.dtype))


def _fp4(weight: Fp4Weight, matrix: torch.Tensor) -> Fp4Weight:
    # Every code that of 1: each element is then its scale, to the last bit.
    scales = dense_weight(
        weight._replace(codes=torch.full_like(weight.codes, 0x22), dtype=torch.float32), torch.float32
    )
    values, wanted = torch.tensor(VALUES, device=matrix.device), _divided(matrix, scales)
    codes = torch.bucketize(wanted.abs(), (values[1:] + values[:-1]) / 2)
    codes = torch.where((wanted < 0) & (codes > 0), codes + 8, codes).to(torch.uint8).view(len(matrix), -1, 2)
    return weight._replace(codes=codes[..., 0] | (codes[..., 1] << 4))


def _int4(weight: Int4Weight, matrix: torch.Tensor) -> Int4Weight:
    exact = weight._replace(scales=weight.scales.float())
    lowest = dense_weight(exact._replace(codes=torch.zeros_like(weight.codes)), torch.float32)
    highest = dense_weight(exact._replace(codes=torch.full_like(weight.codes, -1)), torch.float32)
    codes = _divided(matrix - lowest, (highest - lowest) / 15).round().clamp(0, 15).int()
    layout = weight.layout
    words = packed_words(codes, 0 if layout.words_along_outputs else 1, layout.interleaved)
    return weight._replace(codes=(words if layout.rows_are_outputs else words.T).contiguous())


def _nf4(weight: Nf4Weight, matrix: torch.Tensor) -> Nf4Weight:
    values, order = weight.code.sort()
    # Every nibble the last code: each element is then that value times its block's absmax.
    last = torch.full_like(weight.packed, 17 * int(order[-1]))
    absmax = dense_weight(weight._replace(packed=last, parity=False), torch.float32) / values[-1]
    nearest = torch.bucketize(_divided(matrix, absmax), (values[1:] + values[:-1]) / 2)
    nibbles = order[nearest].to(torch.uint8).flatten()
    nibbles = torch.nn.functional.pad(nibbles, (0, -len(nibbles) % 2)).view(-1, 2)
    return weight._replace(packed=(nibbles[:, 0] << 4) | nibbles[:, 1])


def _divided(matrix: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The quotient; 0 where all codes have one value."""
    return torch.where(steps == 0, 0.0, matrix / steps)


ENCODERS = {Fp4Weight: _fp4, Fp8Weight: _fp8, Int4Weight: _int4, Nf4Weight: _nf4}
