"""Adapters far from their start, ours and PEFT's, and their tensors by PEFT's keys."""

import peft
import torch

from dora_kernels.adapters import save_load as adapter_module
from dora_kernels.config import DoraConfig
from dora_kernels.models.apply import apply_dora


def randomize(parameters):
    """Trained values: far enough from the start that a dropped tensor or a wrong scaling shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * noise)
            elif "lora_" in name:
                parameter.copy_(0.05 * noise)
            else:
                parameter.add_(0.05 * noise)


def ours(model, **fields):
    apply_dora(model, DoraConfig(**fields))
    randomize((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return model


def pefts(model, **fields):
    model = peft.get_peft_model(model, peft.LoraConfig(use_dora=True, **fields)).eval()
    randomize((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return model


def adapter_tensors(model):
    """Ours or PEFT's, by PEFT's keys."""
    if isinstance(model, peft.PeftModel):
        return peft.get_peft_model_state_dict(model)
    prefixed = adapter_module._adapter_tensors(model).items()
    return {f"base_model.model.{key}": tensor.detach() for key, tensor in prefixed}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key
