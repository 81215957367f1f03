"""No number without correctness: what each operation returns against fp64, for the very shape that is timed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..contestants.layer import ALPHA_OVER_RANK, Problem
from ..counting.operations import beside
from ..measuring.timing import attempt
from .layer import BAR, UNIT_ROUNDOFF, error

WIDE_BAR = 1e-4
"""Of what is returned in fp32: sums over thousands of products of tf32 parts or 16-bit values, whose accumulators
tensor cores may truncate. A dropped term or a wrong scale is off by a hundred times more."""


def truths(problem: Problem, norm, scale, base_out, h) -> dict[str, Callable[[], tuple[torch.Tensor | None, ...]]]:
    """By operation, in fp64, what it returns for these arguments; it shares no code with any implementation."""
    p, s = problem, ALPHA_OVER_RANK
    n, g, z, hidden, dy, B = (t.detach().double() for t in (norm, scale, base_out, h, p.grad_y, p.lora_B))

    def adapted() -> torch.Tensor:
        return p.weight.double() + s * B @ p.lora_A.double()

    def normed() -> tuple[torch.Tensor | None, ...]:
        # A's copy in the compute dtype comes last, and is rounded at random.
        length = adapted().norm(dim=1)
        return length, p.magnitude.double() / length, None

    def merged() -> tuple[torch.Tensor | None, ...]:
        length, ratio, _ = normed()
        return ratio[:, None] * adapted(), length, ratio

    def backward(needs_base: bool) -> tuple[torch.Tensor | None, ...]:
        # y = m ⊙ (v x) / n, so that dm = Σ dy ⊙ y / m, and m = g n.
        grad_B = (s * g)[:, None] * (dy.T @ hidden)
        return (dy * z).sum(0) / (g * n), grad_B, None, dy * g if needs_base else None

    return {
        "weight_norm": normed,
        "merge": merged,
        "merge, g given": lambda: (g[:, None] * adapted(), None, None),
        "rescale_fwd": lambda: (g * (z + s * hidden @ B.T),),
        "rescale_bwd, token space": lambda: backward(True),
        "rescale_bwd, weight space": lambda: backward(False),
        "scaled_cast of B": lambda: ((s * g)[:, None] * B,),
    } | _of_a_gated_mlp(n, g, z, hidden, dy, B)


def _of_a_gated_mlp(n, g, z, hidden, dy, B) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """By autograd through what gate and up return."""
    layers = [(n, g, z, hidden, B), (beside(n), beside(g), beside(z, 1), beside(hidden), beside(B))]

    @torch.enable_grad()
    def backward(space: str) -> tuple[torch.Tensor, ...]:
        outputs = [_output(space, *layer[1:]).requires_grad_() for layer in layers]
        a = F.silu(outputs[0]) * outputs[1]
        found = []
        for grad, y, (norm, scale, _, h, B) in zip(torch.autograd.grad(a, outputs, dy), outputs, layers):
            # V x = y / g.
            dm, dB = (grad * y.detach()).sum(0) / (scale * norm), ALPHA_OVER_RANK * scale[:, None] * (grad.T @ h)
            scaled_B = ALPHA_OVER_RANK * (B if space == "token" else scale[:, None] * B)
            found.append((grad * scale if space == "token" else grad, dm, dB, scaled_B))
        products, *others = zip(*found)
        return torch.cat(products, 1), *map(torch.cat, others), a.detach()

    return {
        "glu_fwd, token space": lambda: backward("token")[-1:],
        "glu_fwd, weight space": lambda: backward("weight")[-1:],
        "glu_bwd, token space": lambda: backward("token"),
        "glu_bwd, weight space": lambda: backward("weight"),
    }


def _output(space: str, scale, product, h, lora_B) -> torch.Tensor:
    """Of the layer's product z = x Wᵀ, or x W'ᵀ."""
    return scale * (product + ALPHA_OVER_RANK * h @ lora_B.T) if space == "token" else product.clone()


def check(calls: dict[str, Callable], truths: dict[str, Callable]) -> tuple[dict[str, list[float]], dict[str, str]]:
    """By operation: the relative errors of what it returns, in its order; and why it failed, of those that did."""
    errors, failed = {}, {}
    for name, call in calls.items():
        found, failure = attempt(lambda call=call, truth=truths[name]: compare(call(), truth()), who=name)
        if failure is None:
            errors[name] = [value for value, _ in found]
            # Not `value > bar`: NaN is a failure.
            wrong = [f"{value:.1e} (allowed {bar:.1e})" for value, bar in found if not value <= bar]
            failure = f"wrong against fp64: {', '.join(wrong)}" if wrong else None
        if failure:
            failed[name] = failure
        print(f"  {name}: {failure or 'correct'}", flush=True)
    return errors, failed


def compare(returned, exact: tuple[torch.Tensor | None, ...]) -> list[tuple[float, float]]:
    """The relative error and its bar of everything that has a truth."""
    returned = returned if isinstance(returned, tuple) else (returned,)
    pairs = [(found, truth) for found, truth in zip(returned, exact, strict=True) if truth is not None]
    return [(error(found, truth), bar(found)) for found, truth in pairs]


def bar(found: torch.Tensor | None) -> float:
    if found is None or found.element_size() >= 4:
        return WIDE_BAR
    return BAR[found.dtype] * UNIT_ROUNDOFF[found.dtype]
