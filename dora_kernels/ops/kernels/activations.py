"""The activations of a gated MLP, and their derivatives, of blocks in fp32 or fp64. NAME is that of `reference`'s."""

import triton
import triton.language as tl


@triton.jit
def _exp(x):
    """eˣ in the steps of CUDA's expf, so that act has the bits of PyTorch's: Triton's own multiplies by log₂ e in fp32
    and errs by |x| / 2 units in the last place. Infinite, or 0, from ±104 on."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        x = tl.minimum(tl.maximum(x, -200.0), 200.0)
        # Rounded down: 1.5 · 2²³ leaves no bits for a fraction.
        whole = (tl.fma(x, 1.4426950408889634, -0.5) + 12582912.0) - 12582912.0
        part = tl.fma(x, 1.4426950216293335, -whole)
        part = tl.fma(x, 1.9259629911e-08, part)  # what fp32 cuts off log₂ e
        y = tl.exp2(part) * tl.exp2(whole)
    return y


@triton.jit
def _divide(x, y):
    """To the last bit, as PyTorch's kernels do: Triton's own fp32 division is not."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def _tanh_of_gelu(x):
    """tanh(√(2/π) (x + 0.044715 x³)), so that 1 + tanh cancels where PyTorch's does."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    tanh = 1.0 - 2.0 / (_exp(2.0 * tl.abs(inner)) + 1.0)
    return tl.where(inner < 0, -tanh, tanh)


@triton.jit
def activation(x, NAME: tl.constexpr):
    """act(x): "silu" or "gelu_tanh"."""
    tl.static_assert(NAME == "silu" or NAME == "gelu_tanh")
    if NAME == "silu":
        y = _divide(x, 1.0 + _exp(-x))
    else:
        y = 0.5 * x * (1.0 + _tanh_of_gelu(x))
    return y


@triton.jit
def derivative(x, NAME: tl.constexpr):
    """act'(x)."""
    if NAME == "silu":
        sigmoid = 1.0 / (1.0 + _exp(-x))
        y = sigmoid * (1.0 + x * (1.0 - sigmoid))
    else:
        tanh = _tanh_of_gelu(x)
        # Beyond, tanh is 1 in fp64 too, and x² would overflow.
        x = tl.minimum(tl.maximum(x, -10.0), 10.0)
        slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
        y = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope
    return y
