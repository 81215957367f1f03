"""Models as training might leave them, and whether their merged logits are near enough."""

import torch

from dora_kernels.config import DoraConfig
from dora_kernels.models.apply import apply_dora
from dora_kernels.models.modules import dora_layers
from tests.tolerances import MERGED_LOGITS


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
    assert (actual - expected).abs().max() <= MERGED_LOGITS[dtype] * expected.abs().max()
