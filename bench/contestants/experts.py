"""A layer's fused experts in every form that competes: the frozen base, PEFT's LoRA and ours.

PEFT has no DoRA for them, so that its LoRA is what ours is held against. Tokens go to the experts in turn, so that each
expert has equally many.
"""

from collections.abc import Callable
from typing import NamedTuple

import peft
import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dora_kernels.layers.experts import DoraExperts, adapt_experts, fuse_gates

from ..measuring.shapes import ExpertShape
from .layer import ALPHA_OVER_RANK, Contestant, Entry

STACKS = ("gate_up_proj", "down_proj")


class Stack(NamedTuple):
    """One fused parameter and its adapters."""

    weight: nn.Parameter  # [E, N, K], frozen
    lora_A: torch.Tensor  # [E, R, K] fp32
    lora_B: torch.Tensor  # [E, N, R] fp32
    magnitude: torch.Tensor  # [E, N] fp32


class ExpertProblem(NamedTuple):
    """The experts' parameters, their tokens and the gradient that comes back."""

    x: torch.Tensor  # [M, K]
    chosen: torch.Tensor  # [M, chosen], each token's experts
    weights: torch.Tensor  # [M, chosen], of their outputs
    stacks: dict[str, Stack]
    grad_y: torch.Tensor  # [M, K]

    @property
    def rank(self) -> int:
        return self.stacks["down_proj"].lora_A.shape[1]

    @property
    def shape(self) -> ExpertShape:
        experts, hidden, intermediate = self.stacks["down_proj"].weight.shape
        return ExpertShape(experts, self.chosen.shape[1], hidden, intermediate)


def make_problem(shape: ExpertShape, tokens: int, rank: int, dtype: torch.dtype, device: torch.device) -> ExpertProblem:
    """Random data at the scales of a trained model, as `layer.make_problem`'s."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

    def stack(N, K):
        E = shape.experts
        weight = normal(E, N, K, scale=0.05)
        norms = torch.linalg.vector_norm(weight, dim=2, dtype=torch.float32)
        return Stack(
            nn.Parameter(weight, requires_grad=False),
            normal(E, rank, K).float(),
            normal(E, N, rank, scale=0.05 * 0.3 / ALPHA_OVER_RANK / rank**0.5).float(),
            (norms * (1 + 0.1 * normal(E, N))).to(dtype).float(),
        )

    stacks = {
        "gate_up_proj": stack(2 * shape.intermediate, shape.hidden),
        "down_proj": stack(shape.hidden, shape.intermediate),
    }
    chosen = torch.arange(tokens * shape.chosen, device=device).view(tokens, shape.chosen) % shape.experts
    weights = (torch.ones(chosen.shape, device=device) / shape.chosen).to(dtype)
    x, grad_y = normal(tokens, shape.hidden).requires_grad_(), normal(tokens, shape.hidden)
    return ExpertProblem(x, chosen, weights, stacks, grad_y)


def contestants(dtype: torch.dtype, device: torch.device) -> dict[str, Contestant]:
    """By name, in the order of the tables."""
    impl = "triton" if device.type == "cuda" else "reference"
    # In fp16 weight space cannot train the magnitude.
    spaces = ("auto", "token") if dtype == torch.float16 else ("auto", "token", "weight")
    found = {"frozen base": Contestant("base", _base), "PEFT LoRA fp32": Contestant("lora", _lora)}
    return found | {f"ours fp32, {space}": Contestant("dora", _ours(space, impl)) for space in spaces}


def counted(
    shape: ExpertShape, rank: int, dtype: torch.dtype, space: str = "auto"
) -> dict[str, Callable[[], nn.Module]]:
    """What builds each on the meta device, without values. `space` is that of ours."""
    return {
        "frozen base": lambda: frozen(shape, dtype),
        "PEFT LoRA fp32": lambda: with_lora(frozen(shape, dtype), rank),
        "ours fp32": lambda: with_ours(frozen(shape, dtype), rank, space, "triton"),
    }


class Holder(nn.Module):
    """PEFT adapts the parameters of a module inside a model."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def frozen(shape: ExpertShape, dtype: torch.dtype) -> Holder:
    """The base, on the meta device."""
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        return Holder(Qwen3MoeExperts(config).to(dtype)).requires_grad_(False)


def with_lora(model: Holder, rank: int) -> nn.Module:
    """PEFT's model."""
    names = [f"experts.{stack}" for stack in STACKS]
    alpha = ALPHA_OVER_RANK * rank
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=[], target_parameters=names)
    return peft.get_peft_model(model, config).train()


def with_ours(model: Holder, rank: int, space: str, impl: str) -> nn.Module:
    """The model, adapted."""
    options = {"r": rank, "lora_alpha": ALPHA_OVER_RANK * rank, "space": space, "impl": impl}
    adapt_experts(model.experts, {stack: DoraExperts(model.experts, stack, **options) for stack in STACKS})
    fuse_gates(model)
    return model.train()


class Routed(nn.Module):
    """The model of one input: where tokens go is the problem's."""

    def __init__(self, model: nn.Module, problem: ExpertProblem):
        super().__init__()
        self.model, self.routes = model, (problem.chosen, problem.weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x, *self.routes)


def _frozen_of(problem: ExpertProblem) -> Holder:
    model = frozen(problem.shape, problem.x.dtype)
    for name, stack in problem.stacks.items():
        setattr(model.experts, name, stack.weight)
    return model


def _base(problem: ExpertProblem) -> Entry:
    return Entry(Routed(_frozen_of(problem), problem), {})


def _lora(problem: ExpertProblem) -> Entry:
    model, trained = with_lora(_frozen_of(problem), problem.rank), {}
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.ParamWrapper):
            name, stack = module.parameter_name, problem.stacks[module.parameter_name]
            for factor, part, value in (
                ("dA", module.lora_A, in_pefts_layout(lora_A=stack.lora_A)),
                ("dB", module.lora_B, in_pefts_layout(lora_B=stack.lora_B)),
            ):
                trained[f"{factor} of {name}"] = part["default"].weight
                part["default"].weight.data = value.clone()
    return Entry(Routed(model, problem), trained)


def _ours(space: str, impl: str) -> Callable[[ExpertProblem], Entry]:
    def build(problem: ExpertProblem) -> Entry:
        model, trained = with_ours(_frozen_of(problem), problem.rank, space, impl), {}
        for name, adapter in model.experts.dora.items():
            for factor, value in zip(("lora_A", "lora_B", "magnitude"), problem.stacks[name][1:]):
                trained[f"d{factor.removeprefix('lora_')[0]} of {name}"] = getattr(adapter, factor)
                getattr(adapter, factor).data = value.clone()
        return Entry(Routed(model, problem), trained)

    return build


def in_pefts_layout(*, lora_A: torch.Tensor | None = None, lora_B: torch.Tensor | None = None) -> torch.Tensor:
    """A as [E R, K], B as [N, R E]."""
    return lora_A.flatten(0, 1) if lora_B is None else lora_B.permute(1, 2, 0).flatten(1)
