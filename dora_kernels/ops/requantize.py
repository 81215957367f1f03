"""A matrix in the format of a packed weight: scales and zeros stay, and each code becomes the nearest.

So W itself comes back to the last bit, and an element never errs by more than it changed: ‖Q(W') − W'‖ ≤ ‖W' − W‖.
Scales computed anew would round every weight once more, which costs far more than a fine-tune's update.
"""

import torch

from .base_weights import Packed
from .dispatch import operations_for
from .quantiser import nearest


def requantized(weight: Packed, matrix: torch.Tensor) -> Packed:
    """The weight with the codes nearest to `matrix` [N, K]; what lies beyond a block's range becomes its end.

    Raises:
        ValueError: `matrix` has another shape, or holds NaN or infinity.
    """
    if matrix.shape != weight.shape:
        raise ValueError(f"matrix should be {list(weight.shape)}, as the packed weight, got {list(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise ValueError("matrix holds NaN or infinity, which the packed weight's format cannot")
    with operations_for(weight) as (ops, packed):
        return nearest(ops, packed, matrix.to(weight.device, torch.float32))
