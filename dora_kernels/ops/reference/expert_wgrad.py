"""Each expert's dA = dhᵀ x, summed in fp32 over its tokens."""

import torch

from ..chunked import mm_fp32
from ..grouped import expert_rows


def expert_wgrad(grad_h: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """dA [E, R, K] in `dtype` of dh [S, R] and x [S, K]; zeros for experts without tokens."""
    grad = torch.zeros(ends.shape[0], grad_h.shape[1], x.shape[1], dtype=dtype, device=x.device)
    for e, rows in expert_rows(ends):
        grad[e] = mm_fp32(grad_h[rows].T, x[rows])
    return grad
