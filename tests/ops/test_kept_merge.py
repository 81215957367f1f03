"""W' that is kept while A, B and m hold the same bits: the kernel and its reference, with `merge`."""

import pytest
import torch

from dora_kernels.ops.types import NEAREST, Rounding
from tests.ops.test_kept_norm import every_engine, make

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# N, K, R, W's dtype and the factors'.
PROBLEMS = {
    "several blocks": (140, 272, 3, BF16, FP32),
    "odd": (33, 333, 24, BF16, FP32),
    "several rank blocks": (9, 160, 70, BF16, BF16),
    "fp32": (40, 80, 5, FP32, FP32),
    "fp64": (16, 64, 4, FP64, FP64),
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def guarded(like):
    """Memory that is written nowhere else, between two rows of NaN."""
    memory = like.new_full((len(like) + 2, like.shape[1]), float("nan"))
    return memory, memory[1:-1]


def changed_at(place):
    found = torch.zeros(256, dtype=torch.int32)
    if place is not None:
        found[place] = 1
    return found


@every_engine
@pytest.mark.parametrize("rounding", [NEAREST, Rounding("dithered", 7)], ids=["nearest", "dithered"])
@pytest.mark.parametrize("place", [0, 255], ids=["first", "last"])
@every_problem
def test_what_changed_is_merged_anew(problem, place, rounding, ops):
    weight, (A, B, m) = make(problem)
    expected, norm_scale = ops.merge(weight, A, B, m, 0.5, dtype=weight.dtype, rounding=rounding)
    memory, out = guarded(expected)
    options = {"rounding": rounding, "norm_scale": norm_scale, "out": out}
    ops.kept_merge(weight, A, B, 0.5, changed=changed_at(place), **options)
    assert torch.equal(out, expected)
    assert memory[0].isnan().all() and memory[-1].isnan().all()


@every_engine
@every_problem
def test_what_did_not_stays(problem, ops):
    weight, (A, B, m) = make(problem)
    norm_scale, _ = ops.weight_norm(weight, A, B, m, 0.5)
    out = torch.full_like(weight, 3.0)
    ops.kept_merge(weight, A, B, 0.5, rounding=NEAREST, norm_scale=norm_scale, changed=changed_at(None), out=out)
    assert (out == 3.0).all()


@every_engine
def test_no_features(ops):
    weight, (A, B, m) = make((0, 32, 2, FP32, FP32))
    norm_scale, _ = ops.weight_norm(weight, A, B, m, 0.5)
    out = torch.empty_like(weight)
    ops.kept_merge(weight, A, B, 0.5, rounding=NEAREST, norm_scale=norm_scale, changed=changed_at(0), out=out)
