"""The noise of dithered rounding passes for independent noise; hashes that are cheaper still fail the same measures."""

from itertools import product

import pytest
import torch

from dora_kernels.ops.reference.rounding import dither_hash, round_to
from dora_kernels.ops.types import Rounding

LOW32 = 0xFFFFFFFF
GOLDEN, FIRST, SECOND = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35
SIZE = 768
PLACES = list(product([0, 1, 7, 0xC0FFEE42, 0x80000000, 12345], [(0, 0), (13568, 8192), (65536, 13568)]))
"""Salts, and the first row and column."""

BARS = {"row means": 6.5, "column means": 6.5, "pairs of rows": 6.5, "pairs of columns": 6.5, "singular value": 1.06}
"""Largest value of each measure. The first four are in standard deviations of independent noise: one of the 10⁷ pairs
of all places exceeds 6.5 once in a thousand tries. The last is in units of 2 √SIZE, from which the largest singular
value of independent noise differs by a per cent."""


def ours(rows, columns, salt):
    """16 bits of noise [rows, columns], as all of these."""
    return (dither_hash(rows, columns, salt) >> 16) & 0xFFFF


def _row_hash(rows, salt):
    """murmur3's finaliser, a column."""
    h = rows ^ salt
    h = ((h ^ (h >> 16)) * FIRST) & LOW32
    h = ((h ^ (h >> 13)) * SECOND) & LOW32
    return (h ^ (h >> 16))[:, None]


def xormul(rows, columns, salt):
    """A product of rowhash ^ column · G."""
    return (((_row_hash(rows, salt) ^ (columns * GOLDEN & LOW32)) * FIRST) & LOW32) >> 16


def xormul2(rows, columns, salt):
    """The same for pairs of columns, each of the two with a constant of its own."""
    constant = torch.where(columns % 2 == 1, FIRST, SECOND)
    return (((_row_hash(rows, salt) ^ (columns // 2 * GOLDEN & LOW32)) * constant) & LOW32) >> 16


def weyl(rows, columns, salt):
    """a(row) · column + b(row)."""
    row_hash = _row_hash(rows, salt)
    return (((row_hash | 1) * columns + row_hash * SECOND) & LOW32) >> 16


def separable(rows, columns, salt):
    """hash(row) ^ hash(column)."""
    return (_row_hash(rows, salt) ^ _row_hash(columns, 0).T) & 0xFFFF


def multiplicative(rows, columns, salt):
    """A multiple of the flat index."""
    return (((rows[:, None] * 4096 + columns + salt) * GOLDEN) & LOW32) >> 16


REJECTED = [xormul, xormul2, weyl, separable, multiplicative]


def _numbers(noise):
    """16 bits of noise as numbers of mean 0 and variance 1."""
    return ((noise + 0.5) / 65536 - 0.5) * 12**0.5


def _largest_correlation(rows):
    """Of all pairs of rows, in standard deviations of independent ones."""
    return float((rows @ rows.T).fill_diagonal_(0).abs().max() / rows.shape[1] ** 0.5)


def measure(noise):
    """{measure: value} of 16 bits of noise [SIZE, SIZE]."""
    numbers = _numbers(noise)
    return {
        "row means": float(numbers.mean(1).abs().max() * SIZE**0.5),
        "column means": float(numbers.mean(0).abs().max() * SIZE**0.5),
        "pairs of rows": _largest_correlation(numbers),
        "pairs of columns": _largest_correlation(numbers.T),
        "singular value": float(torch.linalg.eigvalsh(numbers @ numbers.T)[-1].sqrt() / (2 * SIZE**0.5)),
    }


def _above(hash16):
    """The place and value of each measure that is above its bar, place by place."""
    for salt, (first_row, first_column) in PLACES:
        rows, columns = torch.arange(first_row, first_row + SIZE), torch.arange(first_column, first_column + SIZE)
        for name, value in measure(hash16(rows, columns, salt)).items():
            if not value <= BARS[name]:
                yield salt, first_row, first_column, name, value


def test_noise_is_as_independent_noise():
    assert not list(_above(ours))


@pytest.mark.parametrize("hash16", REJECTED, ids=[f.__name__ for f in REJECTED])
def test_cheaper_hashes_are_not(hash16):
    assert next(_above(hash16), None)


def _across_salts(hash16, salt):
    """The largest correlation of rows of neighbouring salts."""
    rows, columns = torch.arange(SIZE // 4), torch.arange(SIZE)
    return _largest_correlation(torch.cat([_numbers(hash16(rows, columns, salt + i)) for i in range(4)]))


@pytest.mark.parametrize("salt", [0, 0xC0FFEE40, 0xFFFFFFFC], ids=hex)
def test_neighbouring_salts_share_no_row(salt):
    assert _across_salts(ours, salt) <= BARS["pairs of rows"]
    # With the salt itself in the row's hash they are each other's rows, in another order.
    assert _across_salts(xormul2, salt) > 2 * BARS["pairs of rows"]


@pytest.mark.parametrize(
    ("size", "tolerance"), [(4e-6, 0.12), (4e-5, 0.035), (4e-4, 0.012)], ids=["4e-6", "4e-5", "4e-4"]
)
def test_small_updates_survive(size, tolerance):
    """The share of an update of `size` of the weight that inputs along it see; the tolerances are four standard
    deviations of independent noise."""
    rows, inputs, rank = 512, 4096, 4
    weight = (0.02 * torch.randn(rows, inputs)).bfloat16().float()
    A = torch.randn(rank, inputs)
    update = torch.randn(rows, rank) @ A
    update *= size * weight.norm() / update.norm()
    rounded = round_to(weight + update, torch.bfloat16, Rounding("dithered", 11)).float()
    x = torch.randn(64, rank) @ A
    true, found = x @ update.T, x @ (rounded - weight).T
    assert abs(float((found * true).sum() / true.square().sum()) - 1) < tolerance
