"""A layer's fused experts in every form that competes: the frozen base, PEFT's LoRA and ours. They have no values.

PEFT has no DoRA for them, so that its LoRA is what ours is held against.
"""

from collections.abc import Callable

import peft
import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dora_kernels.layers.experts import DoraExperts, adapt_experts

from ..measuring.shapes import ExpertShape

STACKS = ("gate_up_proj", "down_proj")


class Holder(nn.Module):
    """PEFT adapts the parameters of a module inside a model."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def contestants(shape: ExpertShape, rank: int, dtype: torch.dtype) -> dict[str, Callable[[], nn.Module]]:
    """What builds each, on the meta device."""

    def base() -> nn.Module:
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, num_experts=shape.experts
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            return Holder(Qwen3MoeExperts(config).to(dtype)).requires_grad_(False)

    def lora() -> nn.Module:
        names = [f"experts.{stack}" for stack in STACKS]
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=names)
        return peft.get_peft_model(base(), config).train()

    def ours() -> nn.Module:
        model = base()
        options = {"r": rank, "lora_alpha": 2 * rank, "impl": "triton"}
        adapt_experts(model.experts, {stack: DoraExperts(model.experts, stack, **options) for stack in STACKS})
        return model.train()

    return {"frozen base": base, "PEFT LoRA fp32": lora, "ours fp32": ours}
