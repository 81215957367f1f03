"""A stack of experts with tokens routed to them, solved by us and by an independent fp64 oracle."""

from dataclasses import dataclass

import torch

from dora_kernels.ops.dora_experts import dora_experts

NAMES = ("y", "dx", "dA", "dB", "dm")


@dataclass
class Stack:
    """Inputs of one call and the gradient that comes back; `experts` [S] is each token's own, in order."""

    x: torch.Tensor
    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    bias: torch.Tensor | None
    experts: torch.Tensor
    grad_y: torch.Tensor
    scaling: float = 2.0

    @property
    def ends(self):
        counts = [(self.experts == expert).sum() for expert in range(len(self.weight))]
        return torch.tensor(counts, device=self.x.device).cumsum(0).to(torch.int32)

    def leaves(self, convert=lambda tensor: tensor):
        return [convert(t.detach()).requires_grad_() for t in (self.x, self.lora_A, self.lora_B, self.magnitude)]


def make_stack(counts, N, K, R, dtype=torch.float32, adapter_dtype=None, bias=False, transposed=False, device="cpu"):
    """`counts` are the numbers of tokens of the experts. ‖s B A‖ is a third of ‖W‖, m within 10 % of ‖W‖."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    E, S, adapter_dtype = len(counts), sum(counts), adapter_dtype or dtype
    weight = (normal(E, N, K) * 0.05).to(dtype)
    lora_A, lora_B = normal(E, R, K), normal(E, N, R)
    lora_B *= 0.3 * weight.double().norm() / (2.0 * lora_B @ lora_A).norm()
    magnitude = weight.double().norm(dim=2) * (1 + 0.1 * normal(E, N))
    return Stack(
        x=normal(S, K).to(dtype),
        weight=weight.mT.contiguous().mT if transposed else weight,
        lora_A=lora_A.to(adapter_dtype),
        lora_B=lora_B.to(adapter_dtype),
        magnitude=magnitude.to(adapter_dtype),
        bias=normal(E, N).to(dtype) if bias else None,
        experts=torch.repeat_interleave(torch.arange(E), torch.tensor(counts)).to(device),
        grad_y=normal(S, N).to(dtype),
    )


def solve(stack, **options):
    """By the engine; `options` go to `dora_experts`."""
    leaves = stack.leaves()
    x, *factors = leaves
    y = dora_experts(x, stack.weight, *factors, stack.ends, scaling=stack.scaling, bias=stack.bias, **options)
    return _collect(y, leaves, stack.grad_y[:, : y.shape[1]])


def exact(stack, activation=None):
    """In fp64: W' of each expert, m / ‖V‖ ⊙ V with the norm detached; each token times its own, one after the other.
    With an activation, a function, its value for the first half of the features times the second."""
    leaves = stack.leaves(torch.Tensor.double)
    x, lora_A, lora_B, magnitude = leaves
    adapted = stack.weight.double() + stack.scaling * torch.einsum("eor,eri->eoi", lora_B, lora_A)
    merged = magnitude[..., None] / adapted.detach().norm(dim=2, keepdim=True) * adapted
    rows = [merged[expert] @ token for token, expert in zip(x, stack.experts.tolist())]
    y = torch.stack(rows) if rows else x @ merged[0].T
    if stack.bias is not None:
        y = y + stack.bias.double()[stack.experts]
    if activation is not None:
        gate, up = y.chunk(2, dim=1)
        y = activation(gate) * up
    return _collect(y, leaves, stack.grad_y[:, : y.shape[1]].double())


def _collect(y, leaves, grad_y):
    grads = torch.autograd.grad(y, leaves, grad_y)
    return dict(zip(NAMES, (y.detach(), *grads)))
