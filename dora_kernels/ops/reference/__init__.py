"""The engine's mathematics in plain PyTorch: the CPU path, the test oracle's subject and the benchmark's baseline.

Twin of `dora_kernels.ops.kernels`: the same names, arguments and returns; neither imports the other. Symbols are those
of DoRA (Liu et al., 2024, arXiv 2402.09353), with V = W + s B A and one norm per output feature, detached (its §4.3):

    n = ‖V‖₂ per output feature        g = m / n             y = g ⊙ (x Wᵀ + s (x Aᵀ) Bᵀ) + b = x W'ᵀ + b,  W' = g ⊙ V

    db = Σ dy        dm = Σ dy ⊙ (x Vᵀ) / n        dh = s dy (g ⊙ B)        dB = s g ⊙ (dyᵀ h)        dA = dhᵀ x
    dx = (dy ⊙ g) W + dh A = dy W'

M tokens, N out_features, K in_features, R rank. Sums and products are fp32 (fp64 where an input is fp64).
"""

from .base_weight import decode
from .cast import scaled_cast
from .merge import merge
from .rescale_bwd import rescale_bwd
from .rescale_fwd import rescale_fwd
from .weight_norm import weight_norm

__all__ = ["decode", "merge", "rescale_bwd", "rescale_fwd", "scaled_cast", "weight_norm"]
