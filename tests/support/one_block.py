"""Models of one hand-made block, whose forward is called with one tensor."""

from types import SimpleNamespace

import torch
from torch import nn

D, N = 8, 12
"""Features of the block's input and output, and of a gated MLP between."""


class Host(nn.Module):
    """Embeds its tokens and calls the block, as `model(input_ids)`."""

    main_input_name = "input_ids"

    def __init__(self, block: nn.Module):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.embed, self.block = nn.Embedding(5, D), block

    def forward(self, input_ids):
        return self.block(self.embed(input_ids))


def module(forward, **parts) -> nn.Module:
    """A module of a class of its own, with this forward and these parts: modules, or linear layers by their sizes."""
    torch.manual_seed(0)
    block = type("Block", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(block, name, nn.Linear(*part) if isinstance(part, tuple) else part)
    return block


def mlp(forward, **parts) -> nn.Module:
    """One with the layers `gate`, `up`, `down`, and `both` for the first two in one."""
    return module(forward, **{"gate": (D, N), "up": (D, N), "down": (N, D), "both": (D, 2 * N), **parts})
