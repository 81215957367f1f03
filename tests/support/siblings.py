"""DoRA layers of one input, and their fp64 solution through W' and autograd."""

import torch
import torch.nn.functional as F

import dora_kernels as dk
from dora_kernels.ops.dora_siblings import dora_siblings
from tests.support.mlp import FACTORS, make_member
from tests.support.oracle import relative_error

SIZES = {"q": (24, 3), "k": (10, 16), "v": (13, 40)}
"""Features and rank."""


def make_siblings(M, K, dtype, adapter_dtype=None, biases="", seed=0, sizes=SIZES):
    """x, the gradients that come back, and the layers by name; those in `biases` have one. Their scalings differ."""
    members = {}
    for index, (name, (features, rank)) in enumerate(sizes.items()):
        member = make_member(
            features, K, rank, dtype, adapter_dtype or dtype, bias=name in biases, seed=8 * seed + index
        )
        members[name] = member._replace(scaling=member.scaling * (1 - index / 8))
    generator = torch.Generator().manual_seed(seed)
    x, *grads = (
        torch.randn(M, size, generator=generator, dtype=torch.float64).to(dtype)
        for size in (K, *(member.features for member in members.values()))
    )
    return x.requires_grad_(), grads, members


def leaves(x, members):
    named = {f"{name}.{factor}": getattr(member, factor) for name, member in members.items() for factor in FACTORS}
    return {"x": x} | named


def solved(outputs, x, grads, members):
    """Each layer's y and the gradients, by name."""
    named = leaves(x, members)
    found = torch.autograd.grad(outputs, list(named.values()), grads, allow_unused=True)
    return dict(zip(members, (y.detach() for y in outputs))) | dict(zip(named, found))


def solve(x, grads, members, **options):
    return solved(dora_siblings(x, list(members.values()), **options), x, grads, members)


def one_by_one(x, grads, members, **options):
    """By `dora_linear`, layer by layer."""
    outputs = [
        dk.dora_linear(
            x, member.weight, member.lora_A, member.lora_B, member.magnitude,
            scaling=member.scaling, bias=member.bias, salt=member.rounding.salt, **options,
        )
        for member in members.values()
    ]  # fmt: skip
    return solved(outputs, x, grads, members)


def exact(x, grads, members):
    """In fp64: each W' = m / ‖V‖ ⊙ V with the norm detached, differentiated by autograd."""

    def linear(member):
        adapted = member.weight.double() + member.scaling * member.lora_B.double() @ member.lora_A.double()
        weight = (member.magnitude.double() / adapted.detach().norm(dim=1))[:, None] * adapted
        return F.linear(x.double(), weight, None if member.bias is None else member.bias.double())

    return solved([linear(member) for member in members.values()], x, [grad.double() for grad in grads], members)


def worst(found, expected):
    assert found.keys() == expected.keys()
    return max(relative_error(found[name], expected[name]) for name in expected)
