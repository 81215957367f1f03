"""What a call allocates, counted by torch's dispatcher: shapes and dtypes of all fresh memory of a matrix's size."""

from collections import Counter

import pytest
import torch

from dora_kernels.ops import chunked
from tests.support.allocations import Allocations, without_the_interpreters
from tests.support.nf4 import linear_4bit
from tests.support.oracle import make_problem

# No two of these, and no multiple of one, are alike, so that a shape tells whose it is.
M, N, K, R = 104, 152, 384, 3
DTYPE = torch.bfloat16


def matrices(allocations):
    """Those of at least half the size of the smallest of x, y and W, whichever way round they lie."""
    least = min(M * N, M * K, N * K) // 2
    sizes = {M * N: "MN", M * K: "MK", N * K: "NK"}
    found = Counter()
    for (shape, dtype), count in allocations.made.items():
        size = torch.Size(shape).numel()
        if size >= least:
            found[sizes.get(size, str(list(shape))), dtype] += count
    return found


def allocated(impl, space, nf4, bias, dropout, dtype=DTYPE):
    import dora_kernels as dk

    problem = make_problem(M, N, K, R, dtype, torch.float32, bias=bias)
    weight = linear_4bit(problem.weight).weight if nf4 else problem.weight
    x, lora_A, lora_B, magnitude, *rest = problem.leaves()
    options = {"lora_dropout": 0.5, "dropout_mode": dropout, "training": True} if dropout else {}
    torch.manual_seed(0)
    with Allocations() as forward:
        y = dk.dora_linear(
            x, weight, lora_A, lora_B, magnitude,
            scaling=2.0, bias=rest[0] if bias else None, space=space, impl=impl, **options,
        )  # fmt: skip
    with Allocations() as backward:
        torch.autograd.grad(y, [x, lora_A, lora_B, magnitude, *rest], problem.grad_y)
    return matrices(forward), matrices(backward)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    # The reference's blocks of rows, as small beside these matrices as they are beside real ones.
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 4 * K)
    without_the_interpreters(monkeypatch)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_weight_space(nf4, bias, impl):
    """One W' each way; y, and with a bias the product before it; dx."""
    forward, backward = allocated(impl, "weight", nf4, bias, None)
    assert forward == {("NK", DTYPE): 1, ("MN", DTYPE): 2 if bias else 1}
    assert backward == {("NK", DTYPE): 1, ("MK", DTYPE): 1}


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [DTYPE, torch.float32], ids=str)
def test_token_space(dtype, bias, impl):
    """y over the base GEMM's output, or beside it where that is kept; dZ and dx; nothing of W's size at all."""
    forward, backward = allocated(impl, "token", False, bias, None, dtype)
    assert forward == {("MN", dtype): 2 if bias else 1}
    assert backward == {("MN", dtype): 1, ("MK", dtype): 1}


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_dropout(nf4, impl):
    """As token space, with the dropped x, its mask and its gradient; a 4-bit weight is decoded once each way."""
    forward, backward = allocated(impl, "token", nf4, False, "lora")
    decoded = {("NK", DTYPE): 1} if nf4 else {}
    # F.dropout on a CPU draws, scales and multiplies: its own business.
    assert {key: count for key, count in forward.items() if key[0] != "MK"} == {("MN", DTYPE): 1} | decoded
    assert {key: count for key, count in backward.items() if key[0] != "MK"} == {("MN", DTYPE): 1} | decoded


def test_the_counter_counts():
    with Allocations() as allocations:
        a = torch.ones(N, K, dtype=DTYPE)
        a.T.mul_(2)
        torch.eye(K) @ a.float().T
    found = matrices(allocations)
    assert found["NK", DTYPE] == 1 and found["NK", torch.float32] == 2 and found[str([K, K]), torch.float32] == 1
