"""The codes nearest to a matrix in the format of a packed weight, whose scales and zeros stay."""

from types import ModuleType

import torch

from .base_weights import Fp4Weight, Fp8Weight, Int4Weight, Nf4Weight, Packed
from .base_weights.fp4 import VALUES
from .base_weights.int4 import packed_words


def nearest(ops: ModuleType, weight: Packed, matrix: torch.Tensor) -> Packed:
    """The weight with other codes; `matrix` [N, K] is fp32, finite and on the weight's device. `ops` decodes.

    What lies beyond a block's range becomes its end.
    """
    return ENCODERS[type(weight)](ops, weight, matrix)


def _fp8(ops: ModuleType, weight: Fp8Weight, matrix: torch.Tensor) -> Fp8Weight:
    ones = torch.ones_like(weight.codes, dtype=torch.float32).to(weight.codes.dtype)
    scales = ops.decode(weight._replace(codes=ones), torch.float32)
    most = torch.finfo(weight.codes.dtype).max
    return weight._replace(codes=_divided(matrix, scales).clamp(-most, most).to(weight.codes.dtype))


def _fp4(ops: ModuleType, weight: Fp4Weight, matrix: torch.Tensor) -> Fp4Weight:
    # Every code that of 1: each element is then its scale, to the last bit.
    scales = ops.decode(weight._replace(codes=torch.full_like(weight.codes, 0x22), dtype=torch.float32), torch.float32)
    values, wanted = torch.tensor(VALUES, device=matrix.device), _divided(matrix, scales)
    codes = torch.bucketize(wanted.abs(), (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)
    codes = torch.where((wanted < 0) & (codes > 0), codes + 8, codes).view(len(matrix), -1, 2)
    return weight._replace(codes=codes[..., 0] | (codes[..., 1] << 4))


def _int4(ops: ModuleType, weight: Int4Weight, matrix: torch.Tensor) -> Int4Weight:
    exact = weight._replace(scales=weight.scales.float())
    lowest = ops.decode(exact._replace(codes=torch.zeros_like(weight.codes)), torch.float32)
    highest = ops.decode(exact._replace(codes=torch.full_like(weight.codes, -1)), torch.float32)
    codes = _divided(matrix - lowest, (highest - lowest) / 15).round().clamp(0, 15).int()
    layout = weight.layout
    words = packed_words(codes, 0 if layout.words_along_outputs else 1, layout.interleaved)
    return weight._replace(codes=(words if layout.rows_are_outputs else words.T).contiguous())


def _nf4(ops: ModuleType, weight: Nf4Weight, matrix: torch.Tensor) -> Nf4Weight:
    values, order = weight.code.sort()
    # Every nibble the last code: each element is then that value times its block's absmax.
    last = (17 * order[-1]).to(torch.uint8).expand_as(weight.packed).contiguous()
    absmax = ops.decode(weight._replace(packed=last, parity=False), torch.float32) / values[-1]
    ranks = torch.bucketize(_divided(matrix, absmax), (values[1:] + values[:-1]) / 2, out_int32=True)
    nibbles = order.to(torch.uint8)[ranks].flatten()
    nibbles = torch.nn.functional.pad(nibbles, (0, -len(nibbles) % 2)).view(-1, 2)
    return weight._replace(packed=(nibbles[:, 0] << 4) | nibbles[:, 1])


def _divided(matrix: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The quotient; 0 where all codes have one value."""
    return torch.where(steps == 0, 0.0, matrix / steps)


ENCODERS = {Fp4Weight: _fp4, Fp8Weight: _fp8, Int4Weight: _int4, Nf4Weight: _nf4}
