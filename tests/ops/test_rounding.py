"""Dithered rounding: unbiased, reproducible, harmless to special values; the kernel equal to its twin bit for bit."""

import pytest
import torch
import triton
import triton.language as tl

from dora_kernels.ops import kernels, reference
from dora_kernels.ops.kernels.launch import TRITON_DTYPES
from dora_kernels.ops.kernels.rounding import dither_hash as kernel_hash
from dora_kernels.ops.kernels.rounding import round_to as kernel_round_to
from dora_kernels.ops.reference.rounding import dither_hash, round_to
from dora_kernels.ops.types import Rounding
from tests.support.oracle import make_problem

HALF_TYPES = [torch.bfloat16, torch.float16]


@triton.jit
def _round_kernel(x_ptr, out_ptr, salt, DTYPE: tl.constexpr, DITHERED: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    offsets = rows[:, None] * N + columns[None, :]
    out = kernel_round_to(tl.load(x_ptr + offsets), rows, columns, salt, DTYPE, DITHERED)
    tl.store(out_ptr + offsets, out)


@triton.jit
def _hash_kernel(out_ptr, salt, M: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], kernel_hash(rows, columns, salt).to(tl.int64))


def _murmur3_finaliser(h):
    """Written from murmur3's published constants, on Python integers."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


def _dither_hash(row, column, salt):
    a = _murmur3_finaliser(row ^ (salt * 0x9E3779B9 % 2**32))
    k = column * 0x9E3779B9 % 2**32
    return ((a | 1) * (k ^ (k >> 15)) + a * 0xC2B2AE35) % 2**32


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    2.0**-130,
    -(2.0**-149),
    3.38e38,
    -3.4e38,
    65504.0,
    65519.0,
    -65520.0,
    7e4,
    -1e5,
    6e-8,
    3e-8,
    -1e-9,
]
SPECIAL += [float("inf"), float("-inf"), float("nan"), 2.0**-14, 2.0**-24, 1.0 + 2.0**-10, 1.0 + 2.0**-23]


def _values(M, N):
    values = torch.randn(M, N) * 10.0 ** torch.randint(-9, 6, (M, N))
    values.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    # The canonical NaN of CUDA: adding any hash to its pattern would wrap around.
    values.view(torch.int32)[1, 0] = 0x7FFFFFFF
    return values


@pytest.mark.parametrize("salt", [0, 7, -3, 0xDEADBEEF], ids=hex)
def test_hash_is_its_formula(salt):
    rows, columns = [0, 1, 2, 14335, 65540], [0, 1, 2, 3, 14335, 128255]
    found = dither_hash(torch.tensor(rows), torch.tensor(columns), salt)
    expected = [[_dither_hash(row, column, salt) for column in columns] for row in rows]
    assert (found.long() % 2**32).tolist() == expected


def test_kernel_hash_equals_its_twin(device):
    out = torch.empty(16, 64, dtype=torch.int64, device=device)
    _hash_kernel[(1,)](out, -559038737, 16, 64)
    twin = dither_hash(torch.arange(16), torch.arange(64), -559038737)
    assert torch.equal(out.cpu(), twin.long() % 2**32)


@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_kernel_equals_its_twin(dtype, rounding, device):
    values = _values(32, 64)
    out = torch.empty(32, 64, dtype=dtype, device=device)
    _round_kernel[(1,)](values.to(device), out, 11, TRITON_DTYPES[dtype], rounding == "dithered", 32, 64)
    expected = round_to(values, dtype, Rounding(rounding, 11))
    same = (out.cpu().view(torch.int16) == expected.view(torch.int16)) | (out.cpu().isnan() & expected.isnan())
    assert same.all()


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_special_and_representable_values_do_not_move(dtype):
    values = _values(64, 64)
    representable = values.to(dtype).float()
    rounded = round_to(representable, dtype, Rounding("dithered", 5)).float()
    assert torch.equal(rounded.nan_to_num(1.25e4), representable.nan_to_num(1.25e4))
    assert torch.equal(rounded.signbit(), representable.signbit())
    assert rounded.isnan().sum() == values.isnan().sum() == 2


def test_fp16_overflows_where_nearest_does():
    """A GradScaler skips the step on infinity: the largest number in its place would pass for a gradient."""
    values = torch.tensor([65504.0, 65505.0, 65519.99, 65520.0, 7e4, 3e38, float("inf"), float("nan")]).repeat(64, 8)
    for signed in (values, -values):
        rounded = round_to(signed, torch.float16, Rounding("dithered", 3))
        nearest = round_to(signed, torch.float16, Rounding("nearest", 3))
        assert torch.equal(rounded.nan_to_num(nan=1.0, posinf=2.0, neginf=3.0), nearest.nan_to_num(1.0, 2.0, 3.0))


def test_bf16_overflows_to_infinity():
    largest = torch.full((64, 64), torch.finfo(torch.float32).max)
    assert round_to(largest, torch.bfloat16, Rounding("dithered", 0)).isinf().any()


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("value", [1.0 + 2.0**-12, -1.0 - 2.0**-12, 3e-3, 5.1e-8], ids=str)
def test_unbiased_over_elements(value, dtype):
    values = torch.full((512, 512), value)
    rounded = round_to(values, dtype, Rounding("dithered", 1)).double()
    step = rounded.unique().diff().abs().max() if rounded.unique().numel() > 1 else torch.tensor(0.0)
    # A mean of 2¹⁸ Bernoulli steps: five standard deviations.
    assert (rounded.mean() - values.double().mean()).abs() <= 5 * step / 2 / 512


def test_one_function_of_index_and_salt():
    values = torch.randn(40, 30)
    whole = round_to(values, torch.bfloat16, Rounding("dithered", 9))
    assert torch.equal(whole, round_to(values.clone(), torch.bfloat16, Rounding("dithered", 9)))
    assert torch.equal(whole[17:], round_to(values[17:], torch.bfloat16, Rounding("dithered", 9), first_row=17))
    assert not torch.equal(whole, round_to(values, torch.bfloat16, Rounding("dithered", 10)))


# More tokens and features than a block of any kernel, not as many blocks of one as of the other, and more than a chunk
# of the reference's below.
M, N, K, R = 70, 131, 137, 3


def _roundings(operations):
    """What each operation stores in bf16, dithered."""
    problem = make_problem(M, N, K, R, torch.bfloat16, torch.float32)
    factors = problem.weight, problem.lora_A, problem.lora_B
    options = {"rounding": Rounding("dithered", 0xC0FFEE42)}
    norm_scale, _ = reference.weight_norm(*factors, problem.magnitude, problem.scaling)
    base_out, h = problem.x @ problem.weight.T, problem.x @ problem.lora_A.bfloat16().T
    merged, forward_scale = operations.merge(
        *factors, problem.magnitude, problem.scaling, dtype=torch.bfloat16, **options
    )
    needs = {"magnitude_dtype": None, "B_dtype": None, "bias_dtype": None, "needs_base": True}
    return {
        "rescale_fwd": operations.rescale_fwd(
            base_out, h, problem.lora_B, norm_scale.scale, None, problem.scaling, in_place=False, **options
        ),
        "rescale_bwd": operations.rescale_bwd(
            problem.grad_y, None, None, problem.lora_B, norm_scale, 1.0, saved_is="output", **needs, **options
        )[3],
        "merge": merged,
        "merge_again": operations.merge(
            *factors, None, problem.scaling, dtype=torch.bfloat16, norm_scale=forward_scale, **options
        )[0],
        "scaled_cast": operations.scaled_cast(problem.weight.float() / 3, torch.bfloat16, **options),
    }


def test_an_element_is_rounded_alike_wherever_its_block_begins(monkeypatch):
    """By its place in the whole tensor: in kernels' blocks, in the reference's chunks, in forward and backward."""
    whole, kernel = _roundings(reference), _roundings(kernels)
    monkeypatch.setattr("dora_kernels.ops.chunked.CHUNK_ELEMENTS", 16 * N)
    chunks = _roundings(reference)
    for name, expected in whole.items():
        for found in (kernel[name], chunks[name]):
            # Sums in another order round differently at a boundary, once in thousands; another hash in most places.
            assert (found != expected).float().mean() < 0.01, name
    for found in (whole, kernel):
        assert torch.equal(found["merge"], found["merge_again"]), "the backward's W' is the forward's, to the bit"
