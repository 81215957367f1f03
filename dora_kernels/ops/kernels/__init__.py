"""The engine's Triton kernels. Twin of `dora_kernels.ops.reference`: the same names, arguments and returns.

Symbols are those of `ops.dora_linear`. A launcher checks nothing (its callers did): it allocates, configures and
launches. Kernels read A, B, m, h and the bias as contiguous: launchers copy what is not. A kernel regroups its flat
pointers in named tuples; most of its constants come in three: FORMAT, DOT, CONFIG. No atomics: reductions over programs
have two stages, so the same inputs give the same bits.
"""

from .base_weight import decode
from .cast import scaled_cast
from .expert_glu_bwd import expert_glu_bwd
from .expert_glu_fwd import expert_glu_fwd
from .expert_norm import expert_norm
from .expert_rescale_bwd import expert_rescale_bwd
from .expert_rescale_fwd import expert_rescale_fwd
from .expert_wgrad import expert_wgrad
from .glu_bwd import glu_bwd
from .glu_fwd import glu_fwd
from .kept_merge import kept_merge
from .kept_norm import kept_norm
from .launch import interpreted
from .merge import merge
from .rescale_bwd import rescale_bwd
from .rescale_fwd import rescale_fwd
from .stacked_merge import stacked_merge
from .stacked_norm import stacked_norm
from .weight_norm import weight_norm

__all__ = [
    "decode",
    "expert_glu_bwd",
    "expert_glu_fwd",
    "expert_norm",
    "expert_rescale_bwd",
    "expert_rescale_fwd",
    "expert_wgrad",
    "glu_bwd",
    "glu_fwd",
    "interpreted",
    "kept_merge",
    "kept_norm",
    "merge",
    "rescale_bwd",
    "rescale_fwd",
    "scaled_cast",
    "stacked_merge",
    "stacked_norm",
    "weight_norm",
]
