"""No number without correctness: a layer's experts, output and gradients against fp64, for the shape that is timed."""

import torch
from torch.nn.functional import linear, silu

from ..contestants.experts import ExpertProblem, Stack, in_pefts_layout
from ..contestants.layer import ALPHA_OVER_RANK
from .layer import BAR, UNIT_ROUNDOFF, worse_than

DEEPER = 2
"""Times the bar of one linear: a gradient of gate and up has passed two linears and the product between them."""


def truth(kind: str, problem: ExpertProblem) -> dict[str, torch.Tensor]:
    """In fp64, one expert after the other, by autograd on materialised weights with DoRA's norm detached. It shares no
    code with anybody. Gradients of a LoRA are in PEFT's layout."""
    x, leaves = problem.x.detach().double().requires_grad_(), {}
    merged = {}
    for name, stack in problem.stacks.items():
        merged[name], factors = _weights(kind, stack)
        leaves |= {f"{factor} of {name}": leaf for factor, leaf in factors.items()}
    y = torch.zeros_like(x)
    for expert in range(problem.shape.experts):
        rows, slots = (problem.chosen == expert).nonzero(as_tuple=True)
        gate, up = linear(x[rows], merged["gate_up_proj"](expert)).chunk(2, dim=1)
        out = linear(silu(gate) * up, merged["down_proj"](expert))
        y = y.index_add(0, rows, out * problem.weights[rows, slots, None].double())
    named = {"dx": x} | leaves
    grads = torch.autograd.grad(y, list(named.values()), problem.grad_y.double())
    found = dict(zip(["y", *named], (y.detach(), *grads)))
    return {name: _as_peft(name, value) if kind == "lora" else value for name, value in found.items()}


def _weights(kind: str, stack: Stack):
    """What gives an expert's weight, and the leaves by the names of their gradients."""
    A, B, m = (tensor.double().requires_grad_() for tensor in stack[1:])

    def of(expert: int) -> torch.Tensor:
        weight = stack.weight[expert].double()
        if kind != "base":
            weight = weight + ALPHA_OVER_RANK * B[expert] @ A[expert]
        if kind == "dora":
            weight = (m[expert] / weight.norm(dim=1).detach())[:, None] * weight
        return weight

    return of, {"base": {}, "lora": {"dA": A, "dB": B}, "dora": {"dA": A, "dB": B, "dm": m}}[kind]


def _as_peft(name: str, value: torch.Tensor) -> torch.Tensor:
    if name.startswith("dA "):
        return in_pefts_layout(lora_A=value)
    return in_pefts_layout(lora_B=value) if name.startswith("dB ") else value


def broken(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """What fails, or None."""
    return worse_than(DEEPER * BAR[dtype] * UNIT_ROUNDOFF[dtype], errors)
