"""A PEFT model of one layer with two trained adapters, and whether a call of it was fused."""

import peft
import torch
from torch import nn

from tests.support.peft_models import count_fused, dora_config, trained

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def peft_model(kind=nn.Linear):
    """One layer of the class `kind` with two trained adapters; "default" is active."""
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(kind(16, 12, dtype=torch.float64)), config())
    model.add_adapter("other", config())
    for seed, adapter in enumerate(("default", "other")):
        trained(model, seed, adapter)
    return model.eval()


def config():
    return dora_config(r=2, target_modules=["0"], init_lora_weights="gaussian")


def layer_of(model):
    return model.base_model.model[0]


@torch.no_grad()
def call(model, x=X):
    """The output, and whether the call was fused."""
    with count_fused() as calls:
        y = model(x)
    return y, len(calls) == 1
