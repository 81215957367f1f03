"""`dora_embedding`: DoRA on an embedding as one operation, and its gradient.

    forward    y = g ⊙ (W[ids] + s A[:, ids]ᵀ Bᵀ)        g = m / n
    backward   dh = dy (s g ⊙ B)      dA[:, i] = Σ dh over the tokens of id i
               dm = (Σ dy ⊙ z + s Σ B ⊙ (dyᵀ h)) / n     dB = s g ⊙ (dyᵀ h)      z = W[ids]      h = A[:, ids]ᵀ

It is `dora_linear`, which has the symbols, of one-hot inputs: W [V, D] stands for its transpose, N = D and K = V. The
norm of an output feature therefore runs over the whole vocabulary, as in PEFT: each call reads W once for it. All else
is computed for the batch's ids alone, and the backward reads z and h again instead of keeping them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import dispatch
from .accumulation import keep_norm, kept_norm
from .checks import check_factors, check_options, check_whole, refuse_tracing
from .chunked import mm_fp32
from .output import OutputUse
from .types import NormScale, Rounding


class Call(NamedTuple):
    """The constants of one call."""

    impl: str
    scaling: float
    rounding: Rounding
    padding_idx: int | None
    scale_grad_by_freq: bool
    output_use: OutputUse | None  # where it trains


class DoraEmbeddingFunction(torch.autograd.Function):
    """y [M, D] of ids [M], and the gradients of A, B and m."""

    @staticmethod
    def forward(ctx, lora_A, lora_B, magnitude, weight, ids, given, call):
        ops = dispatch.implementation(call.impl)
        with dispatch.on_device_of(weight), dispatch.without_autocast(weight.device):
            if given is None:
                given = _norm(ops, call, weight.T, (lora_A, lora_B, magnitude))
            base, h, factor_B = F.embedding(ids, weight), _rows_of_A(lora_A, ids, weight.dtype), lora_B
            if h.shape[1] > lora_B.shape[1]:
                factor_B = lora_B.repeat(1, 2)
            y = ops.rescale_fwd(
                base, h, factor_B, given.scale, None, call.scaling, in_place=True, rounding=call.rounding
            )
        ctx.call, ctx.magnitude_dtype = call, magnitude.dtype
        ctx.save_for_backward(lora_A, lora_B, weight, ids, *given)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        # torch's once_differentiable lets a constant grad_y pass, and a gradient penalty would be dropped in silence.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("dora_embedding cannot differentiate twice: call backward without create_graph=True")
        call, (lora_A, lora_B, weight, ids, *norm_scale) = ctx.call, ctx.saved_tensors
        norm_scale, ops = NormScale(*norm_scale), dispatch.implementation(call.impl)
        needs_A, needs_B, needs_magnitude = ctx.needs_input_grad[:3]
        with dispatch.on_device_of(grad_y), dispatch.without_autocast(grad_y.device):
            h, factor_B, rank = None, lora_B, lora_B.shape[1]
            if needs_B or needs_magnitude:
                h = _rows_of_A(lora_A, ids, grad_y.dtype)
                if h.shape[1] > rank:
                    factor_B = lora_B.repeat(1, 2)
            grad_magnitude, grad_B, _, _ = ops.rescale_bwd(
                grad_y, F.embedding(ids, weight) if needs_magnitude else None, h, factor_B, norm_scale, call.scaling,
                saved_is="base",
                magnitude_dtype=ctx.magnitude_dtype if needs_magnitude else None,
                B_dtype=lora_B.dtype if needs_B else None, bias_dtype=None, needs_base=False, rounding=call.rounding,
            )  # fmt: skip
            if grad_B is not None and factor_B is not lora_B:
                grad_B = grad_B[:, :rank] + grad_B[:, rank:]
            grad_A = None
            if needs_A:
                scaled = in_pieces(call.scaling * norm_scale.scale[:, None] * lora_B, grad_y.dtype)
                grad_h = mm_fp32(grad_y, scaled)
                if grad_h.shape[1] > rank:
                    grad_h = grad_h[:, :rank] + grad_h[:, rank:]
                grad_h = grad_h.to(lora_A.dtype)
                padding = -1 if call.padding_idx is None else call.padding_idx
                grad_A = torch.ops.aten.embedding_dense_backward(
                    grad_h, ids, weight.shape[0], padding, call.scale_grad_by_freq
                ).T
        return grad_A, grad_B, grad_magnitude, None, None, None, None


def _norm(ops, call, weight, factors):
    """n and g, kept inside `accumulating` or computed."""
    found = kept_norm(ops, call.output_use, weight, factors, call.scaling)
    if found is None:
        found, _ = ops.weight_norm(weight, *factors, call.scaling)
        keep_norm(call.output_use, factors, call.scaling, found)
    return found


def dora_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    *,
    scaling: float,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    impl: str = "auto",
    rounding: str = "dithered",
    salt: int = 0,
    frozen_scale: tuple[torch.Tensor, torch.Tensor] | None = None,
    output_use: OutputUse | None = None,
) -> torch.Tensor:
    """g ⊙ (W[ids] + s A[:, ids]ᵀ Bᵀ) with g = m / ‖W + s (B A)ᵀ‖ per embedding dimension, the norm detached.

    PEFT's shapes and meaning, without dropout in either mode. Differentiable in `lora_A`, `lora_B` and `magnitude`,
    once.

    Args:
        ids: [...], whole numbers below num_embeddings.
        weight: [num_embeddings, embedding_dim], frozen.
        lora_A: [r, num_embeddings]; lora_B: [embedding_dim, r]; magnitude: [embedding_dim]; fp32 or the weight's dtype.
        scaling: s, `lora_alpha / r`.
        padding_idx: the id of which A gets no gradient.
        scale_grad_by_freq: divides A's gradient by how often an id is in the batch.
        impl, rounding, salt, frozen_scale: see `dora_linear`.
        output_use: shared by the calls of one layer, which keep n inside `accumulating`.

    Returns:
        [..., embedding_dim] in the weight's dtype, under autocast too.

    Raises:
        ValueError, TypeError, RuntimeError: as `dora_linear`.
    """
    refuse_tracing()
    check_whole({"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "magnitude": magnitude, "ids": ids})
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"ids must be whole numbers, got {ids.dtype}")
    if weight.ndim != 2:
        raise ValueError(f"weight must be [num_embeddings, embedding_dim], got shape {list(weight.shape)}")
    check_factors(ids, weight.T, lora_A, lora_B, magnitude, None)
    check_options(rounding)
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (lora_A, lora_B, magnitude))
    if frozen_scale is not None and trains:
        raise ValueError("frozen_scale is for inference: run under torch.no_grad(), or leave it out to train")
    given = None if frozen_scale is None else NormScale(*frozen_scale)
    impl, _ = dispatch.choose_impl(weight.device, impl)
    use = output_use if trains else None
    call = Call(impl, float(scaling), Rounding(rounding, int(salt)), padding_idx, scale_grad_by_freq, use)
    y = DoraEmbeddingFunction.apply(lora_A, lora_B, magnitude, weight, ids.flatten(), given, call)
    return y.view(*ids.shape, weight.shape[1])


def plan(device: torch.device, impl: str = "auto") -> dispatch.Plan:
    """What a call runs, and why."""
    impl, reason = dispatch.choose_impl(device, impl)
    return dispatch.Plan("token", impl, f"token space: only the ids of the batch are composed; {reason}")


def _rows_of_A(lora_A: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """h = A[:, ids]ᵀ [M, R] in `dtype`, or [M, 2 R] `in_pieces`."""
    return in_pieces(lora_A.index_select(1, ids).T, dtype)


def in_pieces(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A factor [.., R] in `dtype`; a wider one as [.., 2 R], rounded beside what that leaves of it, rounded again.

    PEFT multiplies an embedding's fp32 factors in fp32, whatever the table's dtype: their sum is exact to 16 bits.
    """
    rounded = factor.to(dtype)
    if factor.dtype.itemsize <= dtype.itemsize:
        return rounded.contiguous()
    return torch.cat([rounded, (factor - rounded).to(dtype)], dim=-1)
