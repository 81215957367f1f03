"""A tiny model with an embedding, convolutions and linear layers: an image's tokens beside words."""

import torch
from torch import nn


class ImageAndWords(nn.Module):
    """A convolutional patch encoder in the manner of vision towers, a depthwise one, and an embedding."""

    def __init__(self, depthwise=False):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.local = nn.Conv2d(8, 8, 3, padding=1, groups=8 if depthwise else 1, bias=False)
        self.words = nn.Embedding(17, 8, padding_idx=0)
        self.head = nn.Linear(8, 5)

    def forward(self, pixel_values, input_ids):
        image = torch.nn.functional.relu_(self.local(self.patches(pixel_values)))
        tokens = torch.cat([image.flatten(2).transpose(1, 2), self.words(input_ids)], dim=1)
        return self.head(tokens)


TARGETS = ["patches", "local", "words", "head"]


def image_model(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return ImageAndWords(**options).to(dtype)


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return pixels, torch.tensor([[3, 5, 0, 0], [3, 1, 16, 2]])


def trained(model, seed=2):
    """Moves every adapter of ours away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
                parameter.mul_(1 + 0.1 * noise) if "magnitude" in name else parameter.add_(0.1 * noise)
    return model
