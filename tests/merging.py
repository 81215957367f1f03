"""Models as training might leave them, and how near their merged logits must come."""

import torch

from dora_kernels.config import DoraConfig
from dora_kernels.patch import apply_dora, dora_layers

# Worst difference of a logit, relative to the largest one. fp32: a few hundred rounded products; bf16: W' is rounded
# once, by up to half an ulp (2⁻⁹), where the unmerged layer rounds z and y instead, through two layers.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-2}


def trained(model, **fields):
    """The model with an adapter as training might leave it, far enough from the base to see a mistake."""
    torch.manual_seed(1)
    apply_dora(model, DoraConfig(r=3, lora_alpha=6, **fields))
    with torch.no_grad():
        for layer in dora_layers(model).values():
            layer.lora_B.normal_(std=0.05)
            layer.magnitude.mul_(1 + 0.1 * torch.randn_like(layer.magnitude))
    return model


def assert_close(actual, expected, dtype):
    assert (actual - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
