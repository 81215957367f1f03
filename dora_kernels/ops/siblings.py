"""The two forms of layers that share an input, forward and backward. `dora_siblings` has the equations."""

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import forms
from .base_weights import dense
from .call import Call, Gradients, Inputs
from .members import (
    Member,
    feature_slices,
    grad_A,
    grad_h,
    grad_x_of_products,
    rank_slices,
    smallest_first,
)
from .merged_members import merged, merged_and_A, norms_and_A, part_of, stacked_A
from .output import WriteCounter, columns_shared_with_the_model, note_written, shared_with_the_model
from .recomputation import keeps_merged
from .types import NormScale


class Own(NamedTuple):
    """What the backward reads of one layer in token space, as `forms.Saved` has it."""

    base_out: torch.Tensor | None = None
    output: torch.Tensor | None = None
    base_bias: torch.Tensor | None = None


class Saved(NamedTuple):
    """What the backward reads."""

    x: torch.Tensor  # [M, K]
    norm: torch.Tensor  # [ΣN]
    scale: torch.Tensor  # [ΣN]
    h: torch.Tensor | None = None  # [M, ΣR], in token space
    A: torch.Tensor | None = None  # [ΣR, K] in x's dtype, in token space
    output: torch.Tensor | None = None  # [M, ΣN] without the biases, in weight space
    merged: torch.Tensor | None = None  # [ΣN, K] W', inside a checkpointed region, or kept by `accumulating`
    layers: tuple[Own, ...] = ()  # in token space

    def tensors(self) -> list[torch.Tensor | None]:
        return [*self[:-1], *(tensor for own in self.layers for tensor in own)]

    @classmethod
    def of(cls, tensors: list[torch.Tensor | None]) -> "Saved":
        """Of `tensors()`."""
        count, size = len(cls._fields) - 1, len(Own._fields)
        layers = (Own(*tensors[start : start + size]) for start in range(count, len(tensors), size))
        return cls(*tensors[:count], tuple(layers))


Outputs = tuple[list[torch.Tensor], Saved, list[WriteCounter | None]]
"""Each layer's y [M, N], and what is saved. Where dm is read off y, the counter of the writes to it."""

TRAINED = Gradients(None, None, None, True, True, None)
"""What a layer's own pass is asked for: a block's factors all train, and its biases do not."""


def token_forward(ops: ModuleType, calls: list[Call], x: torch.Tensor, members: list[Member]) -> Outputs:
    """h = x Aᵀ [M, ΣR], one GEMM; then z and y of each layer."""
    norm_scale, A = norms_and_A(ops, members, x.dtype)
    h = x @ A.T
    outputs, layers, writes = [], [], []
    for call, member, ranks, rows in zip(calls, members, rank_slices(members), feature_slices(members)):
        inputs = Inputs(x, None, None, member.lora_B, None, member.bias, member.weight, None)
        y, *own = forms.token_output(ops, call, inputs, h[:, ranks], part_of(norm_scale, rows), TRAINED)
        own, counter = Own(*own), None
        if own.output is y:
            y, kept, counter = shared_with_the_model(y, member.use)
            own = own._replace(output=kept)
        outputs.append(y)
        layers.append(own)
        writes.append(counter)
    return outputs, Saved(x, *norm_scale, h, A, layers=tuple(layers)), writes


def weight_forward(ops: ModuleType, x: torch.Tensor, members: list[Member], *, needs_x: bool) -> Outputs:
    """x W'ᵀ [M, ΣN], one GEMM, whose columns are each layer's y; a bias is added to a copy of them."""
    weight, norm_scale = merged(ops, members, x.dtype)
    output, outputs, writes = x @ weight.T, [], []
    for member, rows in zip(members, feature_slices(members)):
        if member.bias is None:
            y, counter = columns_shared_with_the_model(output, rows)
        else:
            y, counter = output[:, rows] + member.bias.to(x.dtype), None
        outputs.append(y)
        writes.append(counter)
    kept = weight if needs_x and keeps_merged(weight, members[0].use) else None
    return outputs, Saved(x, *norm_scale, output=output, merged=kept), writes


def backward(
    ops: ModuleType,
    calls: list[Call],
    grads: list[torch.Tensor],
    saved: Saved,
    members: list[Member],
    writes: list[WriteCounter | None],
    *,
    needs_x: bool,
) -> tuple[torch.Tensor | None, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """dx [M, K], where it is asked for, and each layer's dA, dB and dm, from each dy [M, N].

    In weight space h [M, ΣR] is made only now, of A in x's dtype, which the pass that merges again writes beside.
    """
    x, in_token_space = saved.x, saved.h is not None
    # In fp16 g comes in through dz, as in `forms`.
    through_products = x.dtype == torch.float16
    h, weight = saved.h, saved.merged
    if not in_token_space:
        if needs_x and weight is None:
            weight, A = merged_and_A(ops, members, x.dtype, NormScale(saved.norm, saved.scale))
        else:
            A = stacked_A(ops, members, x.dtype)
        h = x @ A.T
        del A
    of_B_and_m, products, scaled_B = [], [], []
    for call, member, own, grad, counter in zip(calls, members, _each(saved, members, h), grads, writes):
        if counter is not None and counter.has_moved:
            note_written(member.use, can_repeat=True)
            own = _with_product_again(ops, call, own, in_token_space)
        asked = TRAINED._replace(lora_B=member.lora_B.dtype, magnitude=member.magnitude.dtype)
        needs_product = in_token_space and (needs_x or through_products)
        (grad_m, grad_B, _, product), B = forms.rescale_backward_and_B(
            ops, call, grad, own, asked, needs_B=True, with_g=not through_products, needs_base=needs_product
        )
        of_B_and_m.append((grad_B, grad_m))
        products.append(product)
        scaled_B.append(B)
    dh = grad_h(products if through_products else grads, scaled_B)
    factors = [(of_A, *others) for of_A, others in zip(grad_A(members, dh, x), of_B_and_m)]
    if not needs_x:
        return None, factors
    if in_token_space:
        return grad_x_of_products(ops, members, dh, saved.A, products), factors
    return _grad_x_merged(grads, weight, members), factors


def _each(saved, members, h):
    """What the backward reads of each layer, as `forms` has it."""
    norm_scale, rows = NormScale(saved.norm, saved.scale), feature_slices(members)
    layers = saved.layers or [Own(output=saved.output[:, own]) for own in rows]
    return [
        forms.Saved(
            saved.x, h[:, ranks], *own, member.lora_A, member.lora_B, *part_of(norm_scale, features), member.weight
        )
        for member, own, ranks, features in zip(members, layers, rank_slices(members), rows)
    ]


def _with_product_again(ops, call, own, in_token_space):
    """With what dm is read off made again, as the model wrote over it."""
    if in_token_space:
        return own._replace(output=None, base_out=F.linear(own.lora_x, dense(own.weight, own.lora_x.dtype, ops)))
    return own._replace(output=F.linear(own.lora_x, forms.merged_again(ops, call, own, own.lora_x.dtype)))


def _grad_x_merged(grads, weight, members):
    """dx [M, K] = Σ dy W', summed inside the GEMMs."""
    parts = [(grads[index], weight[feature_slices(members)[index]]) for index in smallest_first(members)]
    grad_x = torch.mm(*parts[0])
    for part in parts[1:]:
        grad_x.addmm_(*part)
    return grad_x
