"""The two forms of the operation, each as a forward and a backward. `dora_linear` has the equations and the symbols."""

from types import ModuleType

import torch
import torch.nn.functional as F

from .base_weights import dense, readable
from .call import Call, Gradients, Inputs, Saved
from .checkpointing import is_selective
from .chunked import mm_fp32
from .kept_weight import merged_weight
from .recomputation import keeps_merged, leave_norm
from .served import served_weight
from .types import NormScale


def token_forward(ops: ModuleType, call: Call, inputs: Inputs, needs: Gradients) -> tuple[torch.Tensor, Saved]:
    """z = x Wᵀ [M, N], h = x Aᵀ [M, R], then y = g ⊙ (z + s h Bᵀ) + b in one pass.

    With PEFT's dropout y = x Wᵀ + b + (g − 1) ⊙ x_dropped Wᵀ + g ⊙ s h Bᵀ, of two base GEMMs.
    """
    x, x_dropped, _, lora_B, *_ = inputs
    weight = readable(inputs.weight)
    norm_scale, A_cast = _norm_and_cast(ops, call, inputs, weight)
    leave_norm(call, inputs, norm_scale)
    lora_x = x if x_dropped is None else x_dropped
    h = lora_x @ A_cast.T
    y, base_out, output, base_bias = token_output(ops, call, inputs._replace(weight=weight), h, norm_scale, needs)
    return y, Saved(lora_x, h, base_out, output, base_bias, A_cast, lora_B, *norm_scale, inputs.weight)


def token_output(
    ops: ModuleType, call: Call, inputs: Inputs, h: torch.Tensor, norm_scale: NormScale, needs: Gradients
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """y of h, and `base_out`, `output` and `base_bias` as `Saved` keeps them."""
    x, x_dropped, _, lora_B, _, bias, weight, _ = inputs
    base_weight = dense(weight, x.dtype, ops)
    # A GEMM may start its sums from the bias: only with the base layer's own product a fresh adapter equals that layer
    # to the last bit. In 16 bits what dm needs would not survive taking the bias off again.
    gemm_bias = bias.to(x.dtype) if bias is not None and x.element_size() >= 4 else None
    base_out, undropped, base_bias = F.linear(x, base_weight, gemm_bias), None, gemm_bias
    if call.dropout == "peft":
        base_out, undropped, base_bias = x_dropped @ base_weight.T, base_out, None
    # dm can be read off y only without a bias, above fp16 and without PEFT's dropout; otherwise z is kept.
    keeps_base = needs.magnitude and (bias is not None or undropped is not None or x.dtype == torch.float16)
    y = ops.rescale_fwd(
        base_out, h, lora_B, norm_scale.scale, bias if gemm_bias is None else None, call.scaling,
        base_bias=base_bias, undropped=undropped, in_place=not (keeps_base or is_selective()), rounding=call.rounding,
    )  # fmt: skip
    base_out, output = (base_out, None) if keeps_base else (None, y)
    return y, base_out, output, base_bias


def token_backward(ops: ModuleType, call: Call, grad_y: torch.Tensor, saved: Saved, asked: Gradients) -> Gradients:
    """dZ = dy ⊙ g [M, N] beside dm, dB and db in one pass; dh = dy (s g ⊙ B) [M, R]; dx = dh A + dZ W [M, K].

    Under dropout dh A is the gradient of x_dropped alone. With PEFT's dZ = dy ⊙ (g − 1), x_dropped gets dZ W too, and
    dx = dy W.
    """
    gradients, grad_h = token_backward_without_A(ops, call, grad_y, saved, asked)
    if asked.lora_A is not None:
        gradients = gradients._replace(lora_A=grad_A_of(grad_h, saved.lora_x, asked.lora_A))
    return gradients


def token_backward_without_A(
    ops: ModuleType, call: Call, grad_y: torch.Tensor, saved: Saved, asked: Gradients
) -> tuple[Gradients, torch.Tensor | None]:
    """All gradients but A's, for which `saved.lora_x` is not read, and dh [M, R], where A's or x's is asked for."""
    peft_dropout = call.dropout == "peft"
    # s g ⊙ B is small and rounded once; in fp16 it may underflow while B is young, so there g comes in through dZ.
    through_base = not peft_dropout and grad_y.dtype == torch.float16
    if asked.magnitude is not None and saved.product is None:
        saved = saved._replace(base_out=F.linear(saved.lora_x, dense(saved.weight, grad_y.dtype, ops)))
    needs_input = asked.x is not None or asked.x_dropped is not None
    needs_base = asked.x_dropped is not None if peft_dropout else asked.x is not None or through_base
    needs_h = asked.lora_A is not None or needs_input
    (grad_magnitude, grad_B, grad_bias, grad_base), B = rescale_backward_and_B(
        ops, call, grad_y, saved, asked, needs_B=needs_h, with_g=not through_base,
        needs_base=needs_base, shifts_scale=peft_dropout,
    )  # fmt: skip
    grad_x = grad_dropped = grad_h = None
    if needs_h:
        grad_h = (grad_base if through_base else grad_y) @ B
    if needs_input:
        grad_x, grad_dropped = _input_gradients(ops, call, grad_y, grad_base, grad_h, saved, asked)
    return Gradients(grad_x, grad_dropped, None, grad_B, grad_magnitude, grad_bias), grad_h


def weight_forward(ops: ModuleType, call: Call, inputs: Inputs, needs: Gradients) -> tuple[torch.Tensor, Saved]:
    """W' = g ⊙ (W + s B A) [N, K], then y = x W'ᵀ + b. h = x Aᵀ [M, R], for dB alone, waits for the backward."""
    x, _, lora_A, lora_B, _, bias, weight, _ = inputs
    if call.merge_aware:  # its n is summed in another way, and not kept
        merged, norm_scale = _merge(ops, call, weight, lora_A, inputs.lora_B, inputs.magnitude, x.dtype, inputs.given)
    else:
        merged, norm_scale = merged_weight(ops, call, inputs)
    # Where dA is not asked for, h is smaller to keep than x.
    h = _lora_product(ops, call, x, lora_A) if needs.lora_B and not needs.lora_A else None
    bias = None if bias is None else bias.to(x.dtype)
    if call.merge_aware:
        # dm is not read off y, which has the quantisation's error in it.
        output, y = None, F.linear(x, merged, bias)
    elif needs.magnitude and bias is not None:
        output = x @ merged.T
        y = output + bias
    else:
        output = y = F.linear(x, merged, bias)
    kept = merged if needs.x and keeps_merged(merged, None if call.merge_aware else call.output_use) else None
    return y, Saved(x, h, None, output, None, lora_A, lora_B, *norm_scale, weight, kept)


def weight_backward(ops: ModuleType, call: Call, grad_y: torch.Tensor, saved: Saved, asked: Gradients) -> Gradients:
    """dm, dB and db in one pass; dh = dy (s g ⊙ B) [M, R] for dA alone; dx = dy W' [M, K].

    W' is merged again with the saved n and g, unless a recomputation or `accumulating` kept it. Where W' is
    quantised, dm = Σ dy ⊙ (z + s h Bᵀ) / n takes z = x Wᵀ, one more GEMM: see `served`.
    """
    if asked.magnitude is not None and saved.product is None:
        if call.merge_aware:
            saved = saved._replace(base_out=F.linear(saved.lora_x, dense(saved.weight, grad_y.dtype, ops)))
        else:
            saved = saved._replace(output=F.linear(saved.lora_x, merged_again(ops, call, saved, grad_y.dtype)))
    merged = None
    if (asked.lora_B is not None or saved.base_out is not None) and saved.h is None:
        if asked.x is not None:
            merged, saved = merged_with_A(ops, call, saved, grad_y.dtype)
        A = saved.lora_A if saved.A_cast is None else saved.A_cast
        saved = saved._replace(h=_lora_product(ops, call, saved.lora_x, A), A_cast=None)
        del A
    needs_h = asked.lora_A is not None
    (grad_magnitude, grad_B, grad_bias, _), B = rescale_backward_and_B(ops, call, grad_y, saved, asked, needs_B=needs_h)
    grad_x = grad_A = None
    if needs_h:
        grad_A = grad_A_of(grad_y @ B, saved.lora_x, asked.lora_A)
    if asked.x is not None:
        grad_x = grad_y @ (merged_again(ops, call, saved, grad_y.dtype) if merged is None else merged)
    return Gradients(grad_x, None, grad_A, grad_B, grad_magnitude, grad_bias)


def merged_again(ops, call, saved, dtype, A_into=None):
    """W' [N, K], to the bits of the forward: what was kept of it, or merged again, which fills `A_into`."""
    if saved.merged is not None:
        return saved.merged
    return _merge(ops, call, saved.weight, saved.lora_A, saved.lora_B, None, dtype, saved.norm_scale, A_into)[0]


def _merge(ops, call, weight, lora_A, lora_B, magnitude, dtype, norm_scale, A_into=None):
    """W' [N, K], or Q(W'), and n and g."""
    weight = readable(weight)
    if call.merge_aware:
        return served_weight(ops, weight, lora_A, lora_B, magnitude, call.scaling, dtype=dtype, norm_scale=norm_scale)
    return ops.merge(
        weight, lora_A, lora_B, magnitude, call.scaling,
        dtype=dtype, rounding=call.rounding, norm_scale=norm_scale, A_into=A_into,
    )  # fmt: skip


def merged_with_A(ops, call, saved, dtype):
    """W' as `merged_again` gives it, and `saved` with A in `dtype`, where W' is merged, and A is of another dtype."""
    if saved.merged is not None or call.merge_aware or saved.lora_A.dtype == dtype:
        return merged_again(ops, call, saved, dtype), saved
    A = torch.empty(saved.lora_A.shape, dtype=dtype, device=saved.lora_A.device)
    return merged_again(ops, call, saved, dtype, A_into=A), saved._replace(A_cast=A)


def _lora_product(ops, call, x, lora_A):
    """h = x Aᵀ [M, R] in x's dtype."""
    same = lora_A.dtype == x.dtype
    return x @ (lora_A if same else ops.scaled_cast(lora_A, x.dtype, rounding=call.rounding)).T


def _norm_and_cast(ops, call, inputs, weight):
    """n and g, and A in x's dtype, which the norm's pass over A writes beside."""
    x, _, lora_A, lora_B, magnitude, _, _, norm_scale = inputs
    A_dtype = None if lora_A.dtype == x.dtype else x.dtype
    if norm_scale is None:
        norm_scale, A_cast = ops.weight_norm(
            weight, lora_A, lora_B, magnitude, call.scaling, A_dtype=A_dtype, rounding=call.rounding
        )
    else:
        A_cast = None if A_dtype is None else ops.scaled_cast(lora_A, A_dtype, rounding=call.rounding)
    return norm_scale, lora_A if A_cast is None else A_cast


def _input_gradients(ops, call, grad_y, grad_base, grad_h, saved, asked):
    """The gradients of x and, under dropout, of x_dropped, in token space."""
    # The small product comes first: its rounding is small beside the sum's.
    lora_grad, base_weight = grad_h @ saved.lora_A, dense(saved.weight, grad_y.dtype, ops)
    if call.dropout is None:
        return lora_grad.addmm_(grad_base, base_weight), None
    grad_x = grad_dropped = None
    if asked.x is not None:
        grad_x = (grad_y if call.dropout == "peft" else grad_base) @ base_weight
    if asked.x_dropped is not None:
        grad_dropped = lora_grad.addmm_(grad_base, base_weight) if call.dropout == "peft" else lora_grad
    return grad_x, grad_dropped


def rescale_backward_and_B(ops, call, grad_y, saved, asked, *, needs_B, with_g=True, **options):
    """What `rescale_backward` gives, and s g ⊙ B [N, R], or s B, in dy's dtype where it is asked for."""
    B, has_sums = None, any(dtype is not None for dtype in (asked.magnitude, asked.lora_B, asked.bias))
    if needs_B and has_sums:
        # Beside the sums over tokens, whose launch reads g anyway.
        B = torch.empty(saved.lora_B.shape, dtype=grad_y.dtype, device=grad_y.device)
    found = rescale_backward(ops, call, grad_y, saved, asked, B_into=B, B_has_g=with_g, **options)
    return found, scaled_B(ops, call, grad_y, saved, with_g) if needs_B and not has_sums else B


def rescale_backward(ops, call, grad_y, saved, asked, needs_base=False, shifts_scale=False, B_into=None, B_has_g=True):
    """dm, dB, db and dZ of one pass over dy, None where one is not asked for."""
    from_base = saved.base_out is not None
    return ops.rescale_bwd(
        grad_y, saved.product, saved.h, saved.lora_B,
        saved.norm_scale, call.scaling,
        saved_is="base" if from_base else "output",
        base_bias=saved.base_bias,
        magnitude_dtype=asked.magnitude, B_dtype=asked.lora_B, bias_dtype=asked.bias,
        needs_base=needs_base, shifts_scale=shifts_scale, B_into=B_into, B_has_g=B_has_g, rounding=call.rounding,
    )  # fmt: skip


def scaled_B(ops, call, grad_y, saved, with_g=True):
    """s g ⊙ B [N, R], or s B, in dy's dtype."""
    scale = saved.mag_norm_scale if with_g else None
    return ops.scaled_cast(saved.lora_B, grad_y.dtype, scale=scale, scaling=call.scaling, rounding=call.rounding)


def grad_A_of(grad_h, lora_x, dtype):
    """dA = dhᵀ x [R, K], summed in fp32 for fp32 adapters."""
    return grad_h.T @ lora_x if dtype == lora_x.dtype else mm_fp32(grad_h.T, lora_x).to(dtype)
