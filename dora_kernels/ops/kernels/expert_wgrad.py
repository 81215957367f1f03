"""Each expert's dA = dhᵀ x, summed in fp32 over its tokens."""

import torch

from .expert_sums import Needs, launch_finish, launch_sums
from .launch import acc_dtype


def expert_wgrad(grad_h: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Twin of `reference.expert_wgrad`."""
    E, acc = ends.shape[0], acc_dtype(x.dtype, dtype)
    grad = torch.empty(E, grad_h.shape[1], x.shape[1], dtype=dtype, device=x.device)
    partials = launch_sums(
        x, None, grad_h, None, ends, Needs(False, True, False), acc=acc, grad_base=None, salt=0, dithered=False
    )
    launch_finish(partials, None, None, 1.0, ends, acc=acc, grad_magnitude=None, out=grad.mT)
    return grad
