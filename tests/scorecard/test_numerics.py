"""The harnesses of the scorecard's numerical rows see a wrong engine."""

import itertools
from random import Random
from unittest.mock import patch

import pytest
import torch

from dora_kernels.ops import kernels
from tests.support.interpreter import stock_interpreter

from . import buffers, determinism, errors, gradients, properties, shim


def wrong(name, change):
    """Patches a launcher: `change` is applied to what it returns."""
    right = getattr(kernels, name)
    return patch.object(kernels, name, lambda *args, **options: change(right(*args, **options)))


def dm_times(factor):
    return lambda gradients: (gradients[0] * factor, *gradients[1:])


def generated(mix):
    """The first few cases of a mix, without the oddities in which the value in question may be zero."""
    drawn = (properties.draw(Random(str(number))) for number in itertools.count())
    fitting = (case for case in drawn if case.mix == mix and case.features == "plain" and 0 not in case.lead)
    return itertools.islice(fitting, 5)


def test_generated_cases_pass():
    for number in range(20):
        case = properties.draw(Random(f"suite/{number}"))
        share, name = properties.worst(case)
        assert share <= 1, (name, case)


def test_a_generated_case_sees_a_wrong_gradient():
    for case in generated("fp32"):
        with wrong("rescale_bwd", dm_times(1.01)):
            share, name = properties.worst(case)
        assert share > 1 and name == "dm", case


def test_a_generated_case_sees_nan():
    with wrong("rescale_bwd", dm_times(torch.nan)):
        assert not properties.worst(next(generated("bf16")))[0] <= 1


def test_gradcheck_sees_a_wrong_gradient():
    with wrong("rescale_bwd", dm_times(1.01)), pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradients.run("fast/0")


def test_determinism_sees_an_atomic():
    """Sums in another order each time, as an atomic addition makes them."""
    noise = itertools.count(1)
    differing = wrong("rescale_bwd", lambda gradients: dm_times(1 + next(noise) * 2.0**-22)(gradients))
    with differing, pytest.raises(AssertionError, match="dm differs"):
        determinism.run("layer triton token float32 none")


@pytest.mark.parametrize("case", ["rounding", "dot"])
def test_the_shims_row_sees_the_stock_interpreter(case):
    with stock_interpreter(), pytest.raises(AssertionError, match=r"\d+ of \d+ differ"):
        shim.run(case)


def test_a_kernel_without_a_guarded_launch_is_named():
    launches = dict.fromkeys(buffers.kernels(), 1)
    assert buffers.judge([{"failed": None, "passed": 1, "launches": launches}]).met
    launches.pop("_merge_scale_kernel")
    verdict = buffers.judge([{"failed": None, "passed": 1, "launches": launches}])
    assert not verdict.met and "without _merge_scale_kernel" in verdict.measured


def test_the_errors_row_names_what_misses():
    def record(mix, y):
        values = {"y": y, "dx": 1.0, "dA": 1.0, "dB": 1.0, "dm": 1.0}
        peft = dict.fromkeys(values, 1.5)
        squares = {"peft": peft, "token nearest": values, "token dithered": values, "token floor": {"y": 1.15}}
        return {"case": f"{mix}/0", "failed": None, "squares": squares}

    assert errors.judge([record("bf16", 1.0), record("fp32", 1.0)]).met
    verdict = errors.judge([record("bf16", 1.0), record("fp16", 1.2)])
    assert not verdict.met and "above the target: fp16 (its two roundings alone: 0.88)" in verdict.measured
