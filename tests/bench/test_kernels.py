"""`bench kernels`: an operation that is wrong is not timed, and a floor counts every argument once."""

import pytest
import torch

from bench import kernels
from bench.gates import kernels as kernel_gate
from bench.measuring.shapes import layer_shapes

CPU = torch.device("cpu")
SHAPE = layer_shapes("tiny")[2]
TOKENS, RANK = 24, 4


def broken(name, change):
    """`operations` with one operation's results changed."""
    right = kernels.operations

    def operations(*arguments):
        works = right(*arguments)
        call = works[name].call
        return works | {name: works[name]._replace(call=lambda: change(call()))}

    return operations


def grown(result, at):
    """The result of that number 3 % larger."""
    if isinstance(result, torch.Tensor):
        return result * 1.03
    return tuple(value * 1.03 if i == at else value for i, value in enumerate(result))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_operation_is_correct(dtype):
    results = kernels.measure(SHAPE, TOKENS, RANK, dtype, CPU, repetitions=1)
    for name, row in results.items():
        assert row["failed"] is None and row["seconds"]["total"], name
    held = [row["errors"] for row in results.values() if "errors" in row]
    assert [len(errors) for errors in held] == [2, 3, 1, 1, 3, 2, 1, 1, 1, 5, 5]


RETURNED = [
    *(("weight_norm", 0), ("weight_norm", 1), ("merge", 0), ("merge", 1), ("merge", 2), ("merge, g given", 0)),
    *(("rescale_fwd", 0), ("rescale_bwd, token space", 0), ("rescale_bwd, token space", 1)),
    *(("rescale_bwd, token space", 3), ("rescale_bwd, weight space", 0), ("rescale_bwd, weight space", 1)),
    *(("scaled_cast of B", 0), ("glu_fwd, token space", 0), ("glu_fwd, weight space", 0)),
    *(
        (f"glu_bwd, {space} space", at)
        for space, at in (("token", 0), ("token", 4), ("weight", 1), ("weight", 2), ("weight", 3))
    ),
]


@pytest.mark.parametrize(("name", "at"), RETURNED, ids=lambda value: str(value))
def test_a_wrong_operation_is_a_row_that_says_so_and_is_not_timed(name, at, monkeypatch):
    monkeypatch.setattr(kernels, "operations", broken(name, lambda result: grown(result, at)))
    results = kernels.measure(SHAPE, TOKENS, RANK, torch.float32, CPU, repetitions=1)
    assert results[name]["failed"].startswith("wrong against fp64: ") and not results[name]["seconds"]
    assert all(row["failed"] is None for other, row in results.items() if other != name)
    assert name in kernels.kernels_table(results)


def test_a_result_that_is_missing_or_unwritten_is_wrong():
    truths = {"op": lambda: (torch.ones(3, dtype=torch.float64), None)}
    for wrong in ((None, None), (torch.full((3,), torch.nan), None), (torch.ones(1), None)):
        assert "wrong" in kernel_gate.check({"op": lambda wrong=wrong: wrong}, truths)[1]["op"]
    assert kernel_gate.check({"op": lambda: (torch.ones(3), None)}, truths)[1] == {}


def test_a_floor_counts_every_argument_and_result_once():
    """Of merge: W, A, B and m, W', n and g, though its launches may read W twice."""
    N, K = SHAPE.out_features, SHAPE.in_features
    counted = kernels.count(SHAPE, TOKENS, RANK, torch.bfloat16, (9, 0))
    factors = 2 * N * K + 4 * (RANK * K + N * RANK)
    assert counted["merge"].compulsory_bytes == factors + 4 * N + 2 * N * K + 2 * 4 * N
    assert counted["merge, g given"].compulsory_bytes == factors + 2 * N * K + 2 * 4 * N
    assert counted["rescale_fwd"].compulsory_bytes == 2 * (2 * TOKENS * N) + 2 * TOKENS * RANK + 4 * N * RANK + 4 * N
    mlp = 3 * (2 * TOKENS * N), 2 * (2 * TOKENS * RANK) + 2 * (4 * N * RANK) + 2 * 4 * N
    assert counted["glu_fwd, weight space"].compulsory_bytes == mlp[0]
    assert counted["glu_fwd, token space"].compulsory_bytes == sum(mlp)
    rows = {name: one.row() for name, one in counted.items()}
    # Launches read what they must and some of it again; the accounting of what they write is exact.
    assert all(row["memory_bytes"] >= 0.9 * row["compulsory_bytes"] for row in rows.values()), rows


def test_products_in_fp32_precision_are_slower_than_the_measured_gemm_on_a_gpu_alone():
    """There the GEMM is in bf16, and they are three products in tf32; on a CPU both are in fp32."""

    def row(moved, flops, time=1.0):
        return {"memory_bytes": moved, "flops": flops, "seconds": {"total": {"median": time}}}

    work = row(1, {"tf32x3": 50})
    for multiplied, slower in (("bf16", 6), ("fp32", 1)):
        roofs = {kernels.COPY: row(1000, {}), kernels.GEMM: row(0, {multiplied: 100}, time=2.0)}
        assert kernels.floor(work, roofs) == pytest.approx(slower * 50 / 50)
    _, sizes = kernels.roof_calls(CPU)
    assert list(sizes[kernels.GEMM]["flops"]) == ["fp32"]
