"""The engine's Triton kernels. Twin of `dora_kernels.ops.reference`: the same names, arguments and returns.

M tokens, N out_features, K in_features, R rank. Every launcher checks nothing (its callers did), allocates,
configures and launches. No atomics: reductions over programs have two stages, so the same inputs give the same bits.
"""

from .base_weight import decode
from .cast import scaled_cast
from .launch import interpreted
from .merge import merge
from .rescale_bwd import rescale_bwd
from .rescale_fwd import rescale_fwd
from .weight_norm import weight_norm

__all__ = ["decode", "interpreted", "merge", "rescale_bwd", "rescale_fwd", "scaled_cast", "weight_norm"]
