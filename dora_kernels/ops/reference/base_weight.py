"""Rows of the frozen weight W [N, K]: a matrix, or packed and decoded as it is read."""

import torch

from ..base_weights import Fp4Weight, Fp8Weight, Int4Weight, Nf4Weight, Packed
from ..base_weights.fp4 import VALUES
from ..chunked import row_chunks


def weight_rows(weight: torch.Tensor | Packed, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """W[rows] [rows, K] in `dtype`; what is packed is decoded in fp32."""
    if isinstance(weight, torch.Tensor):
        return weight[rows].to(dtype)
    return ROWS[type(weight)](weight, rows).to(dtype)


def _fp8_rows(weight: Fp8Weight, rows: slice) -> torch.Tensor:
    height, width = weight.block
    scales = weight.scales.float()[torch.arange(rows.start, rows.stop, device=weight.device) // height]
    return weight.codes[rows].float() * scales.repeat_interleave(width, 1)[:, : weight.shape[1]]


def _fp4_rows(weight: Fp4Weight, rows: slice) -> torch.Tensor:
    pairs = weight.codes[rows]
    codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1).int()
    values = torch.tensor(VALUES, device=weight.device)[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    scales = weight.scales[rows]
    if scales.dtype == torch.uint8:
        scales = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 127)
    scales = scales.float()
    if weight.global_scale is not None:
        scales = scales * weight.global_scale if weight.is_factor else scales / weight.global_scale
    return (values * scales.repeat_interleave(weight.group, 1)).to(weight.dtype)


def _int4_rows(weight: Int4Weight, rows: slice) -> torch.Tensor:
    features = torch.arange(rows.start, rows.stop, device=weight.device)
    columns = torch.arange(weight.shape[1], device=weight.device)
    groups = columns // weight.group if weight.groups is None else weight.groups
    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    if not weight.layout.rows_are_outputs:
        codes, scales, zeros = codes.T, scales.T, None if zeros is None else zeros.T
    if weight.layout.words_along_outputs:
        codes = _nibbles(weight, codes[features // 8], features[:, None])
    else:
        codes = _nibbles(weight, codes[features][:, columns // 8], columns)
    if zeros is None:
        centred = codes - 8
    else:
        zeros = _nibbles(weight, zeros[features // 8], features[:, None])
        centred = codes - zeros[:, groups]
    return (centred.float() * scales[features].float()[:, groups]).to(weight.dtype)


def _nibbles(weight: Int4Weight, words: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of each word the code of element `index` of eight."""
    place = index % 8
    if weight.layout.interleaved:
        place = place // 2 + place % 2 * 4
    return (words >> (4 * place)) & 15


def _nf4_rows(weight: Nf4Weight, rows: slice) -> torch.Tensor:
    columns = weight.shape[1]
    first, last = rows.start * columns, rows.stop * columns
    pairs = weight.packed[first // 2 : (last + 1) // 2]
    # Even elements are in the high nibble; `first` may be odd where the number of columns is.
    nibbles = torch.stack((pairs >> 4, pairs & 15), dim=1).view(-1)[first % 2 :][: last - first]
    blocks = torch.arange(first, last, device=weight.device) // weight.blocksize
    decoded = weight.code[nibbles.int()] * _absmax(weight)[blocks]
    if weight.parity:
        decoded = decoded.to(weight.dtype)
    return decoded.view(-1, columns)


def decode(weight: Packed, dtype: torch.dtype) -> torch.Tensor:
    """W [N, K] in `dtype`, rounded once, to nearest (with `parity` to the dtype it was quantised from, first)."""
    decoded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in row_chunks(*weight.shape):
        decoded[rows] = weight_rows(weight, rows, dtype)
    return decoded


def _absmax(weight: Nf4Weight) -> torch.Tensor:
    """The largest magnitude of each block, fp32: a 64th of the weight's elements."""
    if not weight.nested_blocksize:
        return weight.absmax
    scale = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: weight.absmax.shape[0]]
    return weight.nested_code[weight.absmax.int()] * scale + weight.offset


ROWS = {Fp4Weight: _fp4_rows, Fp8Weight: _fp8_rows, Int4Weight: _int4_rows, Nf4Weight: _nf4_rows}
