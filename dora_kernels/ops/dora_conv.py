"""`dora_conv`: DoRA on a convolution as one operation, and its gradient.

    forward    y = conv(x, W') + b           W' = g ⊙ (W + s B A)
    backward   h = conv(x, A)                dh = dy (s g ⊙ B)
               dA = conv's weight gradient at (x, dh)      dx = conv's input gradient at (dy, W')

dm, dB and db are those of `dora_linear`, which has the symbols. Its matrices are views here: W [N, C, *k] is [N, K]
with K = C · Πk, A [R, C, *k] is [R, K], and an image [batch, N, *positions] is [M, N] with M = batch · Πpositions. That
is weight space.

Token space, y = g ⊙ (z + s conv₁(conv(x, A), B)) + b, takes what no W' computes: dropout, and PEFT's meaning of grouped
and of otherwise padded convolutions. There A reads all input channels, and zeros beyond the border.
"""

import torch
import torch.nn.functional as F

from . import dispatch
from .accumulation import kept_norm
from .call import NO_GRADIENTS, Call, Gradients, Inputs, Saved
from .checks import check_factors, check_options, check_placement, check_whole, dtype_of_call, refuse_tracing
from .convolution import CONV, Geometry, as_image, as_kernel, as_matrix, as_rows, is_channels_last
from .forms import merged_again, rescale_backward_and_B
from .kept_weight import merged_weight
from .output import OutputUse, note_written, shared_with_the_model
from .recomputation import keeps_merged, remember_norm, remembered_norm
from .types import NormScale, Rounding


class DoraConvFunction(torch.autograd.Function):
    """y [batch, N, *positions] and the five gradients, in weight space.

    The backward merges again with the saved n and g. dm is read off the output before its bias, which is kept.
    """

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, magnitude, bias, weight, given, call, geometry):
        needs = _gradients(ctx.needs_input_grad) if call.trains else NO_GRADIENTS
        ctx.channels_last, ctx.kernel, ctx.x_shape = is_channels_last(weight), weight.shape, x.shape
        matrix, matrix_A = (as_matrix(tensor, ctx.channels_last) for tensor in (weight, lora_A))
        matrix_B = lora_B.flatten(1)
        ops = dispatch.implementation(call.impl)
        with dispatch.on_device_of(x), dispatch.without_autocast(x.device):
            factors = matrix_A, matrix_B, magnitude.flatten()
            if given is None and call.trains:
                given = kept_norm(ops, call.output_use, matrix, factors, call.scaling)
            inputs = Inputs(x, None, *factors, None, matrix, given)
            merged, norm_scale = merged_weight(ops, call, inputs)
            kernel, bias = as_kernel(merged, ctx.kernel, ctx.channels_last), None if bias is None else bias.to(x.dtype)
            if needs.magnitude and bias is not None:
                output = geometry.convolved(x, kernel)
                y = output + bias.view(-1, *[1] * (weight.ndim - 2))
            else:
                output = y = geometry.convolved(x, kernel, bias)
            h = _lora_image(ops, call, x, matrix_A, ctx, geometry) if needs.lora_B and not needs.lora_A else None
        remember_norm(call.output_use, (lora_A, lora_B, magnitude), call.scaling, norm_scale)
        kept = merged if needs.x and keeps_merged(merged, call.output_use) else None
        saved = Saved(x, h, None, output, None, matrix_A, matrix_B, *norm_scale, matrix, kept).for_backward(needs)
        ctx.call, ctx.geometry, ctx.writes = call, geometry, None
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, lora_A, lora_B, magnitude, bias)]
        if saved.output is y:
            y, output, ctx.writes = shared_with_the_model(y, call.output_use)
            saved = saved._replace(output=output)
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        # torch's once_differentiable lets a constant grad_y pass, and a gradient penalty would be dropped in silence.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("dora_conv cannot differentiate twice: call backward without create_graph=True")
        call, geometry, saved = ctx.call, ctx.geometry, Saved(*ctx.saved_tensors)
        asked = _gradients([dtype if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad)])
        ops = dispatch.implementation(call.impl)
        if ctx.writes is not None and ctx.writes.has_moved:
            saved = saved._replace(output=None)
            note_written(call.output_use, can_repeat=saved.lora_x is not None)
        with dispatch.on_device_of(grad_y), dispatch.without_autocast(grad_y.device):
            if asked.magnitude is not None and saved.output is None:
                kernel = as_kernel(merged_again(ops, call, saved, grad_y.dtype), ctx.kernel, ctx.channels_last)
                saved = saved._replace(output=geometry.convolved(saved.lora_x, kernel))
            if asked.lora_B is not None and saved.h is None:
                saved = saved._replace(h=_lora_image(ops, call, saved.lora_x, saved.lora_A, ctx, geometry))
            rows = as_rows(grad_y)
            output, h = (None if image is None else as_rows(image) for image in (saved.output, saved.h))
            (grad_magnitude, grad_B, grad_bias, _), B = rescale_backward_and_B(
                ops, call, rows, saved._replace(output=output, h=h), asked, needs_B=asked.lora_A is not None
            )
            grad_x = grad_A = None
            if asked.lora_A is not None:
                grad_h = as_image(rows @ B, grad_y.shape)
                shape = torch.Size((saved.lora_A.shape[0], *ctx.kernel[1:]))
                grad_A = geometry.weight_gradient(saved.lora_x, shape, grad_h).to(asked.lora_A)
            if asked.x is not None:
                kernel = as_kernel(merged_again(ops, call, saved, grad_y.dtype), ctx.kernel, ctx.channels_last)
                grad_x = geometry.input_gradient(ctx.x_shape, kernel, grad_y)
        ones = [1] * (len(ctx.kernel) - 2)
        if grad_B is not None:
            grad_B = grad_B.view(*grad_B.shape, *ones)
        if grad_magnitude is not None:
            grad_magnitude = grad_magnitude.view(1, -1, *ones)
        return grad_x, grad_A, grad_B, grad_magnitude, grad_bias, None, None, None, None


def dora_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    *,
    scaling: float,
    geometry: Geometry,
    bias: torch.Tensor | None = None,
    space: str = "auto",
    impl: str = "auto",
    rounding: str = "dithered",
    lora_dropout: float = 0.0,
    dropout_mode: str = "lora",
    training: bool = False,
    salt: int = 0,
    frozen_scale: tuple[torch.Tensor, torch.Tensor] | None = None,
    output_use: OutputUse | None = None,
) -> torch.Tensor:
    """g ⊙ (conv(x, W) + s conv₁(conv(x, A), B)) + b with g = m / ‖W + s B A‖ per output channel, the norm detached.

    PEFT's shapes and meaning. Differentiable in `x`, `lora_A`, `lora_B`, `magnitude` and `bias`, once.

    Args:
        x: [batch, in_channels, *positions], or without a batch, of one to three spatial dimensions.
        weight: [out_channels, in_channels / groups, *kernel_size] in x's dtype (any, under autocast), frozen.
        lora_A: [r, in_channels, *kernel_size]; lora_B: [out_channels, r / groups, 1, …]; magnitude:
            [1, out_channels, 1, …]; fp32 or x's dtype.
        geometry: the convolution's settings. With more than one group, and where it pads by anything but zeros, A
            convolves as a plain convolution of this stride and these widths, as PEFT's does.
        space: "weight" (W' first, then one convolution), "token" (three convolutions) or "auto": "weight", unless
            `why_token_space` has a reason.
        bias, impl, rounding, lora_dropout, dropout_mode, training, salt, frozen_scale, output_use: see `dora_linear`.
            Token space rounds to nearest, once.

    Returns:
        [batch, out_channels, *positions] in x's dtype (under autocast: autocast's).

    Raises:
        ValueError, TypeError, RuntimeError: as `dora_linear`.
    """
    refuse_tracing()
    _check(x, weight, lora_A, lora_B, magnitude, bias, geometry)
    check_options(rounding, lora_dropout, dropout_mode)
    dtype = dtype_of_call(x, weight)
    trainable = any(t is not None and t.requires_grad for t in (x, lora_A, lora_B, magnitude, bias))
    # As in `dora_linear`: a checkpointed forward and its recomputation take one form.
    trains = trainable and (training or torch.is_grad_enabled())
    if frozen_scale is not None and trains:
        raise ValueError("frozen_scale is for inference: run under torch.no_grad(), or leave it out to train")
    dropout = dropout_mode if training and lora_dropout > 0 else None
    only_token = why_token_space(weight, geometry, dtype, dropout, trains and magnitude.requires_grad)
    plan = choose(weight.device, space, impl, only_token)
    batch = x if x.ndim == weight.ndim else x[None]
    given = None if frozen_scale is None else NormScale(*frozen_scale)
    if trains:
        given = remembered_norm(output_use, (lora_A, lora_B, magnitude), float(scaling))
    if plan.space == "token":
        # PEFT casts before it drops: the mask is the same either way.
        dropped = batch.to(dtype) if dropout is None else F.dropout(batch, lora_dropout).to(dtype)
        if given is None:
            given = norm_and_scale(weight, lora_A, lora_B, magnitude, scaling, geometry.groups, plan.impl)
        factors = weight.to(dtype), lora_A, lora_B, magnitude, bias
        with dispatch.without_autocast(x.device):
            y = _token_space(batch.to(dtype), dropped, *factors, given.norm, scaling, geometry, dropout)
    else:
        call = Call(plan.space, plan.impl, float(scaling), Rounding(rounding, int(salt)), dropout, trains, output_use)
        padded, moves = geometry.padded(batch.to(dtype), weight.shape[2:])
        y = DoraConvFunction.apply(padded, lora_A, lora_B, magnitude, bias, weight, given, call, moves)
    return y if batch is x else y[0]


def norm_and_scale(weight, lora_A, lora_B, magnitude, scaling, groups, impl="auto") -> NormScale:
    """n = ‖W + s B A‖ and g = m / n, both [out_channels].

    With several groups W + s B A is PEFT's sum of W and B [N / groups, R] A [R, groups · K], in one order of memory.
    """
    # In the order of memory, in which forward sums: the magnitude of a fresh adapter is this very norm.
    magnitude, channels_last = magnitude.flatten(), is_channels_last(weight) and groups == 1
    matrix, matrix_A = (as_matrix(tensor, channels_last) for tensor in (weight, lora_A))
    if groups > 1:
        # The groups' rows of B A, one beside the other; what is left to the operations is ‖V‖.
        wide = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
        with torch.no_grad(), dispatch.without_autocast(weight.device):
            product = lora_B.reshape(-1, lora_A.shape[0]).to(wide) @ matrix_A.to(wide)
            matrix = matrix.to(wide) + scaling * product.view(matrix.shape)
        matrix_A, lora_B = matrix.new_zeros(1, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], 1)
    with dispatch.operations_for(matrix, impl) as (ops, base):
        return ops.weight_norm(base, matrix_A, lora_B.flatten(1), magnitude, scaling)[0]


def why_no_weight(geometry: Geometry, kernel_size: tuple[int, ...]) -> str | None:
    """Why no weight W' of this convolution computes what PEFT's adapter does, as what follows its name, or None."""
    if geometry.groups > 1:
        return f"has {geometry.groups} groups and one lora_A, which reads all input channels"
    if geometry.padding_mode != "zeros" and any(map(any, geometry.widths(kernel_size))):
        return f"pads by padding_mode={geometry.padding_mode!r}, and its lora_A by zeros"
    return None


def why_token_space(weight, geometry, dtype, dropout, trains_magnitude) -> str | None:
    """Why a call cannot take weight space, or None."""
    if reason := why_no_weight(geometry, weight.shape[2:]):
        return f"the convolution {reason}"
    if dropout is not None:
        return "dropout needs conv(x, W) and conv(x, A) apart"
    if dtype == torch.float16 and trains_magnitude:
        return "in fp16 the gradient of the magnitude underflows unless conv(x, W) is kept"
    return None


def choose(device: torch.device, space: str, impl: str, only_token: str | None) -> dispatch.Plan:
    """What runs, where `space` and `impl` are asked for; `only_token` is why weight space cannot.

    Raises:
        ValueError: a `space` or `impl` that does not exist, or cannot run this call.
    """
    impl, impl_reason = dispatch.choose_impl(device, impl)
    if space not in ("auto", "token", "weight"):
        raise ValueError(f'space must be "auto", "token" or "weight", got {space!r}')
    if space == "weight" and only_token:
        raise ValueError(f'space="weight" cannot run this call: {only_token}; use space="token" or "auto"')
    if space != "auto":
        return dispatch.Plan(space, impl, f"{space} space: asked for; {impl_reason}")
    if only_token:
        return dispatch.Plan("token", impl, f"token space: {only_token}; {impl_reason}")
    return dispatch.Plan("weight", impl, f"weight space: one convolution in place of three; {impl_reason}")


def _token_space(x, x_dropped, weight, lora_A, lora_B, magnitude, bias, norm, scaling, geometry, dropout):
    """By PyTorch's own operations, which autograd differentiates; sums in n's dtype, rounded once."""
    kernel_size, ones = weight.shape[2:], [1] * (weight.ndim - 2)
    plain = geometry._replace(groups=1, padding_mode="zeros")
    lora_x, moves = plain.padded(x_dropped, kernel_size)
    h = moves.convolved(lora_x, lora_A.to(x.dtype))
    low_rank = CONV[weight.ndim](h, lora_B.to(x.dtype), groups=geometry.groups).to(norm.dtype)
    padded, moves = geometry.padded(x, kernel_size)
    base = moves.convolved(padded, weight).to(norm.dtype)
    # A channel of zeros answers with its bias, and no gradient passes.
    zero = norm < torch.finfo(norm.dtype).tiny
    scale = torch.where(zero, 0, magnitude.flatten().to(norm.dtype) / torch.where(zero, 1, norm)).view(-1, *ones)
    if dropout == "peft":
        padded, moves = geometry.padded(x_dropped, kernel_size)
        y = base + (scale - 1) * moves.convolved(padded, weight).to(norm.dtype) + scaling * scale * low_rank
    else:
        y = scale * (base + scaling * low_rank)
    if bias is not None:
        y = y + bias.to(norm.dtype).view(-1, *ones)
    return y.to(x.dtype)


def _lora_image(ops, call, x, matrix_A, ctx, geometry):
    """h = conv(x, A) [batch, R, *positions] in x's dtype."""
    if matrix_A.dtype != x.dtype:
        matrix_A = ops.scaled_cast(matrix_A, x.dtype, rounding=call.rounding)
    return geometry.convolved(x, as_kernel(matrix_A, ctx.kernel, ctx.channels_last))


def _gradients(of) -> Gradients:
    """Entries for x, A, B, m and b, in this order, as `forms` has them."""
    x, lora_A, lora_B, magnitude, bias = of[:5]
    return Gradients(x, None, lora_A, lora_B, magnitude, bias)


def _check(x, weight, lora_A, lora_B, magnitude, bias, geometry: Geometry) -> None:
    check_whole({"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "magnitude": magnitude, "bias": bias, "x": x})
    if weight.ndim not in CONV:
        raise ValueError(f"weight must be [out_channels, in_channels, *kernel_size], got shape {list(weight.shape)}")
    groups, ones = geometry.groups, [1] * (weight.ndim - 2)
    channels = weight.shape[1] * groups
    if x.ndim not in (weight.ndim - 1, weight.ndim) or x.shape[1 - weight.ndim] != channels:
        expected = ", ".join(["batch", str(channels), *["…"] * (weight.ndim - 2)])
        raise ValueError(f"x must be [{expected}], or without the batch, got shape {list(x.shape)}")
    rank = lora_A.shape[0] if lora_A.ndim else 0
    if rank < 1 or rank % groups:
        raise ValueError(f"lora_A's rank must be a multiple of the convolution's {groups} groups, got {rank}")
    expected = {
        "lora_A": (lora_A, [rank, channels, *weight.shape[2:]]),
        "lora_B": (lora_B, [weight.shape[0], rank // groups, *ones]),
        "magnitude": (magnitude, [1, weight.shape[0], *ones]),
    }
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {list(tensor.shape)}")
    check_placement(x, {"x": x})
    if groups == 1:
        check_factors(x, weight.flatten(1), lora_A.flatten(1), lora_B.flatten(1), magnitude.flatten(), bias)
