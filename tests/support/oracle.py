"""One DoRA layer's problem, solved three ways: by us, by an independent fp64 oracle, by the installed PEFT."""

from dataclasses import dataclass

import peft
import torch
from torch import nn

import dora_kernels as dk

NAMES = ("y", "dx", "dA", "dB", "dm", "db")


@dataclass
class Problem:
    """Inputs of one layer and the gradient that comes back; leaves without history."""

    x: torch.Tensor
    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    bias: torch.Tensor | None
    grad_y: torch.Tensor
    scaling: float = 2.0

    def leaves(self, convert=lambda tensor: tensor):
        """x, A, B, m and b (if there is one), requiring gradients, in the memory and the layout they have here."""
        tensors = (self.x, self.lora_A, self.lora_B, self.magnitude, self.bias)
        return [convert(t.detach()).requires_grad_() for t in tensors if t is not None]


def make_problem(M, N, K, R, dtype=torch.float32, adapter_dtype=None, bias=False, update=0.3, seed=0, device="cpu"):
    """Random data at the scales of a trained model: ‖s B A‖ / ‖W‖ is `update`, m is within 10 % of ‖W‖."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)

    adapter_dtype = adapter_dtype or dtype
    weight = (normal(N, K) * 0.05).to(dtype)
    lora_A, lora_B = normal(R, K), normal(N, R)
    product = 2.0 * lora_B @ lora_A
    lora_B *= update * weight.double().norm() / product.norm().clamp_min(1e-30)
    magnitude = weight.double().norm(dim=1) * (1 + 0.1 * normal(N))
    return Problem(
        x=normal(M, K).to(dtype),
        weight=weight,
        lora_A=lora_A.to(adapter_dtype),
        lora_B=lora_B.to(adapter_dtype),
        magnitude=magnitude.to(adapter_dtype),
        bias=normal(N).to(dtype) if bias else None,
        grad_y=normal(M, N).to(dtype),
    )


def _collect(y, leaves, grad_y):
    grads = torch.autograd.grad(y, leaves, grad_y)
    return dict(zip(NAMES, (y.detach(), *grads)))


def solve(problem, autocast=None, **options):
    """By the engine, under autocast to `autocast` if given; `options` go to `dora_linear`."""
    leaves = problem.leaves()
    x, lora_A, lora_B, magnitude, *bias = leaves
    with _autocast(autocast):
        y = dk.dora_linear(
            x, problem.weight, lora_A, lora_B, magnitude,
            scaling=problem.scaling, bias=bias[0] if bias else None, **options,
        )  # fmt: skip
    return _collect(y, leaves, problem.grad_y)


def _autocast(dtype):
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def exact(problem, keep=None, mode="lora"):
    """In fp64: materialise W' = m / ‖V‖ ⊙ V with the norm detached, and let autograd differentiate.

    `keep` is a dropout's mask, 0 or 1 / (1 − p): in `mode` "lora" what A and B add sees the dropped input, in "peft"
    all that DoRA adds to the base layer. An output feature without weight is 0 (plus bias).
    """
    leaves = problem.leaves(torch.Tensor.double)
    scale = leaves[3] / _exact_norm(problem)
    return _evaluate(problem, leaves, problem.weight.double(), scale, keep, mode, power=1)


def term_sizes(problem, smallest, keep=None, mode="lora", keeps_bias=False):
    """{name: √ of the sum of all its squared terms}: the size of a value if none of them cancel.

    A value is a sum of products, so the same function of squares is the sum of the products' squares. Factors and
    values of dh below `smallest`, the smallest normal number, count as that: what lies below is stored less exactly. A
    norm that cancels counts as often as its own terms are larger than it. With `keeps_bias` x Wᵀ is kept with the bias,
    as PEFT keeps it, which is taken off again for dm: two terms that cancel.
    """
    leaves = problem.leaves(lambda tensor: tensor.double().abs().clamp_min(smallest).square())
    weight, norm = problem.weight.double().square(), _exact_norm(problem).square()
    x, lora_A, lora_B, magnitude, *_ = leaves
    terms = (weight + problem.scaling**2 * lora_B @ lora_A).sum(dim=1).detach()
    inverse = (terms / norm).clamp_min(1) / norm
    squares = _evaluate(problem, leaves, weight, magnitude * inverse, keep, mode, power=2)
    squares["dA"] += smallest**2 * x.detach().sum() / problem.weight.shape[1]
    if keeps_bias:
        grad_y = problem.grad_y.double().reshape(-1, len(magnitude))
        squares["dm"] += grad_y.square().sum(dim=0) * leaves[4].detach() * inverse
    squares["dx"] += smallest**2 * lora_A.detach().sum() / problem.weight.shape[1]
    return {name: square.sum().sqrt().item() for name, square in squares.items()}


def _exact_norm(problem):
    """‖V‖ per output feature, infinite where V is zero."""
    adapted = problem.weight.double() + problem.scaling * problem.lora_B.double() @ problem.lora_A.double()
    norm = adapted.norm(dim=1)
    return norm.masked_fill(norm == 0, torch.inf)


def _evaluate(problem, leaves, weight, scale, keep, mode, power):
    """The layer of its leaves, or, with `power` 2, the sum of all squared terms of their squares."""
    x, lora_A, lora_B, _, *bias = leaves
    update, scale = problem.scaling**power * lora_B @ lora_A, scale[:, None]
    if keep is None:
        y = x @ (scale * (weight + update)).T
    else:
        undropped, dropped = scale * weight, scale * update
        if mode == "peft":
            undropped, dropped = weight, scale * (weight + update) + (-1) ** power * weight
        y = x @ undropped.T + (keep.double() ** power * x) @ dropped.T
    y = y + bias[0] if bias else y
    return _collect(y, leaves, problem.grad_y.double() ** power)


class _OneLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def peft_model(problem, dropout=0.0):
    """The installed PEFT's DoRA layer with the problem's parameters in their own dtypes."""
    N, K = problem.weight.shape
    linear = nn.Linear(K, N, bias=problem.bias is not None, dtype=problem.weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(problem.weight)
        if problem.bias is not None:
            linear.bias.copy_(problem.bias)
    rank = problem.lora_A.shape[0]
    config = peft.LoraConfig(
        r=rank, lora_alpha=problem.scaling * rank, lora_dropout=dropout, target_modules=["linear"], use_dora=True
    )
    model = peft.get_peft_model(_OneLinear(linear), config, autocast_adapter_dtype=False)
    set_adapter(model.base_model.model.linear, problem)
    if problem.bias is not None:
        linear.bias.requires_grad_()
    return model


def set_adapter(layer, problem):
    """Gives a PEFT layer the problem's A, B and m; returns its parameters in this order."""
    parts = (layer.lora_A["default"], layer.lora_B["default"], layer.lora_magnitude_vector["default"])
    for part, value in zip(parts, (problem.lora_A, problem.lora_B, problem.magnitude)):
        part.weight.data = value.clone()
    return [part.weight for part in parts]


def solve_peft(problem, autocast=None):
    """By the installed PEFT, under autocast to `autocast` if given."""
    model = peft_model(problem)
    layer = model.base_model.model.linear
    x = problem.x.clone().requires_grad_()
    with _autocast(autocast):
        y = model(x)
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    leaves.append(layer.lora_magnitude_vector["default"].weight)
    if problem.bias is not None:
        leaves.append(layer.base_layer.bias)
    return _collect(y, leaves, problem.grad_y)


def relative_error(value, truth, size=0.0):
    """‖value − truth‖ / ‖truth‖ in fp64, or / `size` where that is larger; 0 where both are empty or zero."""
    difference = (value.double() - truth.double()).norm()
    return 0.0 if difference == 0 else (difference / truth.double().norm().clamp_min(size)).item()


def errors(solution, truth, sizes=None):
    """Relative error per name; with `sizes` from `term_sizes`, what cancels is not held against the result."""
    return {name: relative_error(solution[name], truth[name], (sizes or {}).get(name, 0.0)) for name in truth}
