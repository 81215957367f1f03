"""The one matrix product that must not round: 16-bit factors, fp32 result."""

import torch

from .chunks import row_chunks


def mm_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [P, M] @ b [M, Q] -> [P, Q] in fp32 (fp64 for fp64): the gradients of fp32 adapters over a bf16 base."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    # torch's CPU GEMM has no fp32 output for 16-bit inputs, and an fp32 copy of the activations would be large.
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    for rows in row_chunks(b.shape[0], max(a.shape[0], b.shape[1])):
        out.addmm_(a[:, rows].float(), b[rows].float())
    return out
