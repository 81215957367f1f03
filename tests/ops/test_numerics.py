"""The numerics we promise: error against fp64 next to the installed PEFT's, and small updates that do not vanish."""

from collections import defaultdict
from random import Random

import pytest
import torch

import dora_kernels as dk
from tests.support.beside_peft import MIXES, draw, errors_of_all, root_mean_square, ways
from tests.support.marks import slow
from tests.support.oracle import NAMES, make_problem
from tests.tolerances import PEFT_FACTOR, PEFT_FACTOR_FP32_ADAPTERS, SINGLE_CASE_FACTOR, UNIT_ROUNDOFF

# Of each mix, each in every form and rounding; the scorecard's row `errors` has 100. In fp32 both errors are noise:
# more cases for less of it.
CASES, CASES_FP32 = 12, 36


@pytest.mark.parametrize("mix", [mix if "autocast" in mix else slow(mix) for mix in MIXES])
def test_error_against_fp64_beside_pefts(mix):
    dtype, adapter_dtype, autocast = MIXES[mix]
    unit = UNIT_ROUNDOFF[dtype]
    collected = defaultdict(list)
    for number in range(CASES_FP32 if dtype == torch.float32 else CASES):
        layer = draw(Random(f"{mix}/{number}"))
        problem = make_problem(dtype=dtype, adapter_dtype=adapter_dtype, **layer)
        found = errors_of_all(problem, autocast, salt=layer["seed"])
        for who, of_names in found.items():
            for name, error in of_names.items():
                collected[who, name].append(error)
                theirs = found["peft"][name]
                assert who == "peft" or error <= SINGLE_CASE_FACTOR * max(theirs, unit), (who, name, error, theirs)

    def rms(who, name):
        return root_mean_square(collected[who, name])

    for way in ways(dtype):
        for name in NAMES:
            bar = PEFT_FACTOR[way[1], dtype] * rms("peft", name)
            if mix == "bf16-fp32-adapters" and name in PEFT_FACTOR_FP32_ADAPTERS:
                bar = unit * PEFT_FACTOR_FP32_ADAPTERS[name]
            assert rms(way, name) <= bar, (way, name, rms(way, name), rms("peft", name))


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize(
    ("update", "share"), [(4e-6, 0.85), (4e-5, 0.95), (4e-4, 0.95), (4e-3, 0.95), (4e-2, 0.95)], ids=str
)
def test_small_updates_survive(update, share, space):
    """The share of the true change of the output that a coherent low-rank update of size ‖sBA‖/‖W‖ keeps, all in bf16.

    Rounding to nearest would lose it: adding it to a bf16 W, or g − 1 to a bf16 g, changes almost no stored bit.
    """
    changes = _changes(update, space, "dithered")
    assert share <= changes <= 2 - share, changes


def test_small_updates_do_not_survive_nearest_rounding():
    """The control: the same measurement sees the loss where it is known to be."""
    assert _changes(4e-5, "weight", "nearest") < 0.1


def _changes(update, space, rounding):
    """⟨measured change, true change⟩ / ‖true change‖² of y when the update is switched on."""
    torch.manual_seed(0)
    N, K, R, M = 512, 4096, 4, 16
    weight = (torch.randn(N, K) * 0.02).bfloat16()
    # Coherent: x correlates with A's rows, as trained adapters do with their inputs.
    lora_A = torch.randn(R, K) / K**0.5
    lora_B = torch.randn(N, R)
    lora_B *= update * weight.float().norm() / (lora_B @ lora_A).norm()
    x = (torch.randn(M, R) @ lora_A * K**0.5 + torch.randn(M, K) * 0.1).bfloat16()
    magnitude = weight.double().norm(dim=1).float()

    def run(lora_B):
        y = dk.dora_linear(
            x, weight, lora_A, lora_B, magnitude, scaling=1.0, space=space, rounding=rounding, salt=17, impl="reference"
        )
        return y.double()

    def true(lora_B):
        adapted = weight.double() + lora_B.double() @ lora_A.double()
        return x.double() @ (adapted * (magnitude.double() / adapted.norm(dim=1))[:, None]).T

    expected = true(lora_B) - true(torch.zeros_like(lora_B))
    measured = run(lora_B) - run(torch.zeros_like(lora_B))
    return ((measured * expected).sum() / expected.square().sum()).item()
