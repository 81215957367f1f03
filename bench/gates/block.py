"""No number without correctness: a block's output and gradients against fp64, for the shape that is timed."""

import torch
from torch.nn.functional import silu
from torch.utils._pytree import tree_leaves

from ..contestants.block import BlockProblem
from .layer import BAR, UNIT_ROUNDOFF, exact_linear, worse_than

DEEPER = 2
"""Times the bar of one linear: a gradient of gate or up has passed two linears and the product between them."""


def truth(kind: str, problem: BlockProblem) -> dict[str, torch.Tensor]:
    """In fp64, by autograd on the materialised weights, with DoRA's norm detached; it shares no code with anybody."""
    x, leaves = problem.x.detach().double().requires_grad_(), {}

    def linear(name, x):
        y, factors = exact_linear(kind, x, problem.layers[name])
        leaves.update({f"{factor} of {name}": leaf for factor, leaf in factors.items()})
        return y

    if problem.name == "mlp":
        outputs = (linear("down_proj", silu(linear("gate_proj", x)) * linear("up_proj", x)),)
    else:
        outputs = tuple(linear(name, x) for name in problem.layers)
    named = {"dx": x} | leaves
    grads = torch.autograd.grad(outputs, list(named.values()), [grad.double() for grad in tree_leaves(problem.grad_y)])
    return dict(zip(["y", *named], (torch.cat(outputs, -1).detach(), *grads)))


def broken(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """What fails, or None."""
    return worse_than(DEEPER * BAR[dtype] * UNIT_ROUNDOFF[dtype], errors)
