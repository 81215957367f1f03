"""The engine's mathematics in plain PyTorch: the CPU path, the test oracle's subject and the benchmark's baseline.

Twin of `dora_kernels.ops.kernels`: the same names, arguments and returns; neither imports the other. Symbols and
equations are those of `ops.dora_linear`. Sums and products are fp32 (fp64 where an input is fp64).
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
