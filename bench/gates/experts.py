"""No number without correctness: a layer's experts, output and gradients against fp64, for the shape that is timed."""

import torch
from torch import nn
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from ..contestants.experts import ExpertProblem, Stack, in_pefts_layout
from ..contestants.layer import ALPHA_OVER_RANK
from .layer import BAR, UNIT_ROUNDOFF, worse_than

DEEPER = 2
"""Times the bar of one linear: a gradient of gate and up has passed two linears and the product between them."""


def truth(kind: str, problem: ExpertProblem) -> dict[str, torch.Tensor]:
    """In fp64, one expert after the other, by autograd on materialised weights with DoRA's norm detached. It shares no
    code with anybody. Gradients of a LoRA are in PEFT's layout."""
    x, exact = problem.x.detach().double().requires_grad_(), ExactExperts(kind, problem.stacks)
    y = exact(x, problem.chosen, problem.weights.double())
    named = {"dx": x} | exact.leaves
    grads = torch.autograd.grad(y, list(named.values()), problem.grad_y.double())
    found = dict(zip(["y", *named], (y.detach(), *grads)))
    return {name: _as_peft(name, value) if kind == "lora" else value for name, value in found.items()}


class ExactExperts(nn.Module):
    """A layer's experts in fp64, one after the other. `leaves`: the trained factors by their gradients' names."""

    def __init__(self, kind: str, stacks: dict[str, Stack]):
        super().__init__()
        self._merged, self.leaves = {}, {}
        for name, stack in stacks.items():
            self._merged[name], factors = _weights(kind, stack)
            self.leaves |= {f"{factor} of {name}": leaf for factor, leaf in factors.items()}
        self._experts = len(stack.weight)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for expert in range(self._experts):
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            # Its weights in fp64 are made again in the backward: those of all experts would fill a GPU.
            out = checkpoint(self._expert, expert, x[rows], use_reentrant=False)
            y = y.index_add(0, rows, out * weights[rows, slots, None])
        return y

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = linear(x, self._merged["gate_up_proj"](expert)).chunk(2, dim=1)
        return linear(silu(gate) * up, self._merged["down_proj"](expert))


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
