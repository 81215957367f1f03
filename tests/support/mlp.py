"""A gated MLP of DoRA layers, and its fp64 solution through W' and autograd."""

import torch
import torch.nn.functional as F

from dora_kernels.ops.members import Member
from dora_kernels.ops.types import Rounding
from tests.support.oracle import make_problem

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
FACTORS = ("lora_A", "lora_B", "magnitude")


def make_member(N, K, R, dtype, adapter_dtype, bias=False, seed=0, mode="dithered"):
    problem = make_problem(1, N, K, R, dtype, adapter_dtype, bias=bias, seed=seed)
    factors = (getattr(problem, name).requires_grad_() for name in FACTORS)
    return Member(problem.weight, *factors, problem.bias, problem.scaling, Rounding(mode, seed))


def make_mlp(M, K, inner, R, dtype, adapter_dtype=None, bias=False, stacked=False, seed=0, mode="dithered"):
    """x, the gradient that comes back, and gate, up and down; `up` is None where `gate` holds both. `inner` is I."""
    options = {"dtype": dtype, "adapter_dtype": adapter_dtype or dtype, "bias": bias, "mode": mode}
    gate = make_member(2 * inner if stacked else inner, K, R, seed=4 * seed, **options)
    up = None if stacked else make_member(inner, K, R, seed=4 * seed + 1, **options)
    down = make_member(K, inner, R + 2, seed=4 * seed + 2, **options)
    x, grad_y = torch.randn(2, M, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.requires_grad_(), grad_y, gate, up, down


def leaves(x, *members):
    """What gets a gradient, by name."""
    named = {f"{position}.{name}": getattr(member, name) for position, member in members for name in FACTORS}
    return {"x": x} | named


def parts(gate, up, down):
    return [(name, member) for name, member in (("gate", gate), ("up", up), ("down", down)) if member is not None]


def solved(y, x, members, grad_y):
    """y and the gradients, by name."""
    named = leaves(x, *members)
    return {"y": y.detach()} | dict(zip(named, torch.autograd.grad(y, list(named.values()), grad_y)))


def exact(x, grad_y, gate, up, down, activation):
    """In fp64: each W' = m / ‖V‖ ⊙ V with the norm detached, differentiated by autograd."""

    def linear(x, member):
        update = member.scaling * member.lora_B.double() @ member.lora_A.double()
        adapted = member.weight.double() + update
        merged = (member.magnitude.double() / adapted.detach().norm(dim=1))[:, None] * adapted
        return F.linear(x, merged, None if member.bias is None else member.bias.double())

    both = [linear(x.double(), member) for member in (gate, up) if member is not None]
    gate_out, up_out = both if up is not None else both[0].chunk(2, dim=-1)
    y = linear(ACTIVATIONS[activation](gate_out) * up_out, down)
    return solved(y, x, parts(gate, up, down), grad_y.double())
