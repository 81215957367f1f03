"""No number without correctness: a contestant's output and gradients against fp64, for the shape that is timed."""

import torch
from torch.nn.functional import linear

from ..contestants.layer import ALPHA_OVER_RANK, Contestant, Problem

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}
BAR = {torch.float32: 64.0, torch.float16: 16.0, torch.bfloat16: 16.0}
"""Units of roundoff that ‖found − exact‖ / ‖exact‖ may reach. The longest chain rounds about six tensors to 16 bits,
each of which adds at most one unit; in fp32 the noise of sums over thousands of terms comes on top. A dropped term or a
wrong scale is off by several times the bar: the update is a third of the weight, m off its norm by 10 %.
It says that a contestant computes the right thing, not how well: tests/ops/test_numerics.py compares that."""


def truth(kind: str, problem: Problem) -> dict[str, torch.Tensor]:
    """In fp64, by autograd on the materialised weight, with DoRA's norm detached; it shares no code with anybody."""
    x = problem.x.detach().double().requires_grad_()
    y, leaves = exact_linear(kind, x, problem)
    leaves = {"dx": x} | leaves
    grads = torch.autograd.grad(y, list(leaves.values()), problem.grad_y.double())
    return dict(zip(["y", *leaves], (y.detach(), *grads)))


def exact_linear(kind: str, x: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The layer's output for `x` in fp64, and its trained factors by the names of their gradients."""
    A, B, m = (t.double().requires_grad_() for t in (problem.lora_A, problem.lora_B, problem.magnitude))
    leaves = {"base": {}, "lora": {"dA": A, "dB": B}, "dora": {"dA": A, "dB": B, "dm": m}}[kind]
    weight = problem.weight.double()
    if kind != "base":
        weight = weight + ALPHA_OVER_RANK * B @ A
    if kind == "dora":
        weight = (m / weight.norm(dim=1).detach())[:, None] * weight
    return linear(x, weight, None if problem.bias is None else problem.bias.double()), leaves


def errors(contestant: Contestant, problem: Problem, exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error by name; infinite where the output or a gradient is missing or of another shape."""
    found = contestant.build(problem).solve(problem)
    return {name: error(found.get(name), value) for name, value in exact.items()}


def broken(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """What fails, or None."""
    return worse_than(BAR[dtype] * UNIT_ROUNDOFF[dtype], errors)


def worse_than(bar: float, errors: dict[str, float]) -> str | None:
    """The errors above the bar, or None."""
    # Not `value > bar`: NaN is a failure.
    wrong = [f"{name} {value:.1e}" for name, value in errors.items() if not value <= bar]
    return f"wrong: {', '.join(wrong)} against fp64, allowed {bar:.1e}" if wrong else None


def error(found: torch.Tensor | None, exact: torch.Tensor) -> float:
    """Relative; infinite where there is nothing, or something of another shape."""
    if found is None or found.shape != exact.shape:
        return float("inf")
    return ((found.double() - exact).norm() / exact.norm()).item()
