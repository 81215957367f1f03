"""A mixture of experts with random weights, whose tokens are spread evenly over the experts of each layer."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from ..measuring.shapes import Run

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class EvenRouter(nn.Module):
    """A router that takes experts in turn, and weighs them as transformers' router would.

    Random weights choose by a hair's breadth: in 16 bits two correct contestants would send tokens to other experts,
    and no loss or gradient could be compared. What the choice costs is paid: scores are sorted, and not looked at.

    Args:
        router: transformers'.
        turns: [tokens or more, experts of a token], int64: each token's experts.
    """

    def __init__(self, router: nn.Module, turns: torch.Tensor):
        super().__init__()
        self.weight = router.weight
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden_states, self.weight)
        scores = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        chosen = self.turns[: len(hidden_states)]
        torch.topk(scores, chosen.shape[1], dim=-1)
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(logits.dtype), chosen


def build_mixture(run: Run, dtype: torch.dtype, device: torch.device, vocabulary: int = 0) -> nn.Module:
    """As `build_base`."""
    m = run.sizes
    own = {"vocab_size": vocabulary or m.vocab_size, "num_hidden_layers": run.layers or m.num_hidden_layers}
    fixed = {"norm_topk_prob": True, "max_position_embeddings": 32768, "use_cache": False}
    config = Qwen3MoeConfig(**m._asdict() | own | fixed)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        turns = torch.arange(run.batch * run.sequence * m.num_experts_per_tok) % m.num_experts
    model.set_experts_implementation("grouped_mm")
    for layer in model.model.layers:
        layer.mlp.gate = EvenRouter(layer.mlp.gate, turns.view(-1, m.num_experts_per_tok))
    return model
