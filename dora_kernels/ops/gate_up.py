"""The two forms of a gated MLP's first half, a = act(gate(x)) ⊙ up(x). `dora_mlp` has the equations and the symbols."""

from types import ModuleType
from typing import NamedTuple

import torch

from .members import (
    Member,
    grad_A,
    grad_h,
    grad_x_of_products,
    products,
    stacked,
)
from .merged_members import merged, norms_and_A, stacked_A
from .recomputation import keeps_merged
from .types import GluFactors, GluGradients, NormScale


class Saved(NamedTuple):
    """What the backward reads."""

    x: torch.Tensor  # [M, K]
    h: torch.Tensor | None  # [M, ΣR], in token space
    A: torch.Tensor | None  # [ΣR, K] in x's dtype, in token space
    gate: torch.Tensor  # [M, I] z in token space; [M, 2 I] where both layers' products are one tensor
    up: torch.Tensor | None
    norm: torch.Tensor  # [2 I]
    scale: torch.Tensor  # [2 I]
    merged: torch.Tensor | None = None  # [2 I, K] W', inside a checkpointed region, or kept by `accumulating`

    @property
    def products(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate's and up's, [M, I]."""
        return self.gate.chunk(2, dim=1) if self.up is None else (self.gate, self.up)


def gate_up_forward(
    ops: ModuleType, space: str, activation: str, x: torch.Tensor, members: list[Member], *, needs_x: bool
) -> tuple[torch.Tensor, Saved]:
    """a [M, I] of x [M, K]. `members` are gate and up, or the one layer that holds both, gate first.

    Token space: h = x Aᵀ, z = x Wᵀ of each, and the adapters inside the pass that makes a.
    Weight space: x W'ᵀ, one GEMM.
    """
    h = A = kept = None
    if space == "token":
        norm_scale, A = norms_and_A(ops, members, x.dtype)
        h, found = x @ A.T, products(ops, members, x)
    else:
        weight, norm_scale = merged(ops, members, x.dtype)
        found = [x @ weight.T]
        kept = weight if needs_x and keeps_merged(weight, members[0].use) else None
        del weight
    saved = Saved(x, h, A, found[0], found[1] if len(found) == 2 else None, *norm_scale, kept)
    return activated(ops, space, activation, saved, members), saved


def activated(ops: ModuleType, space: str, activation: str, saved: Saved, members: list[Member]) -> torch.Tensor:
    """a [M, I]: the pass over the products, in forward and wherever a is needed again."""
    factors = _factors(saved.h, saved, members) if space == "token" else None
    return ops.glu_fwd(*saved.products, factors, _bias(members), activation=activation)


def gate_up_backward(
    ops: ModuleType, space: str, activation: str, grad_a: torch.Tensor, saved: Saved, members: list[Member]
) -> GluGradients:
    """Of one pass over da [M, I], over which a is written. In weight space h [M, ΣR] is made only now."""
    h = saved.x @ stacked_A(ops, members, saved.x.dtype).T if saved.h is None else saved.h
    return ops.glu_bwd(
        grad_a, *saved.products, _factors(h, saved, members), _bias(members), saved.norm,
        space=space, activation=activation, dtype=members[0].lora_B.dtype,
        roundings=tuple(member.rounding for member in members),
    )  # fmt: skip


def gate_up_outer_gradients(
    ops: ModuleType, space: str, found: GluGradients, saved: Saved, members: list[Member], *, needs_x: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """dx [M, K], where it is asked for, and each member's dA, from what the pass over da found."""
    grads = found.products
    parts, in_token_space = grads.chunk(len(members), dim=1), space == "token"
    dh = grad_h(parts, found.scaled_B.chunk(len(members)))
    grads_A = grad_A(members, dh, saved.x)
    if not needs_x:
        return None, grads_A
    if in_token_space:
        return grad_x_of_products(ops, members, dh, saved.A, parts), grads_A
    weight = saved.merged
    if weight is None:
        weight, _ = merged(ops, members, grads.dtype, NormScale(saved.norm, saved.scale))
    return grads @ weight, grads_A


def _factors(h, saved, members):
    lora_B = [member.lora_B for member in members]
    return GluFactors(h, tuple(lora_B) if len(lora_B) == 2 else lora_B[0].chunk(2), saved.scale, members[0].scaling)


def _bias(members):
    return None if members[0].bias is None else stacked([member.bias for member in members])
