"""PEFT DoRA models of the four families, and what is compared between a patched and an unpatched one."""

import copy
from contextlib import contextmanager
from unittest.mock import patch

import peft
import torch

from dora_kernels.blocks import mlp, siblings
from dora_kernels.ops.dora_linear import DoraLinearFunction
from dora_kernels.peft import layer as peft_linear
from tests.support.tiny_models import FAMILIES, VOCAB

FP64 = 1e-11
"""Two fp64 models whose layers sum in another order; measured: below 1e-13."""


def dora_config(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": "all-linear"} | options)


def trained(model, seed=1, adapter="default"):
    """Moves every DoRA adapter called `adapter` away from its start, as training would. Returns the model."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like):
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    with torch.no_grad():
        for module in model.modules():
            if adapter in getattr(module, "lora_magnitude_vector", {}):
                lora_B = module.lora_B[adapter].weight
                lora_B.copy_(0.1 * normal(lora_B))
                magnitude = module.lora_magnitude_vector[adapter].weight
                magnitude.mul_(1 + 0.1 * normal(magnitude))
    return model


def peft_model(family="llama", dtype=torch.float64, **options):
    """A PEFT DoRA model with a trained adapter, in training mode, the same on every call."""
    torch.manual_seed(0)
    return trained(peft.get_peft_model(FAMILIES[family](dtype), dora_config(**options))).train()


def twins(*args, **options):
    """Two equal models."""
    model = peft_model(*args, **options)
    return model, copy.deepcopy(model)


def batch(model):
    tokens = torch.arange(18).reshape(2, 9) * 7 % VOCAB
    if model.config.model_type == "bert":
        return {"input_ids": tokens, "labels": torch.tensor([0, 1])}
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return {"input_ids": tokens, "labels": tokens, **decoder}


def step(model, seed=0):
    """{"logits": …, parameter: gradient}; whatever is drawn, is drawn from `seed`."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(**batch(model))
    output.loss.backward()
    return {"logits": output.logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def infer(model):
    """{"logits": …} without gradients."""
    with torch.no_grad():
        return {"logits": model(**batch(model)).logits}


def assert_close(actual, expected, tolerance=FP64):
    """Equal names and dtypes, and values within `tolerance`, relative to each tensor's norm."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            assert actual[name].dtype == value.dtype, name
            # Some gradients are zero but for rounding: that of a key's bias passes through a softmax.
            norm = max(value.double().norm(), 1e-6)
            assert (actual[name].double() - value.double()).norm() < tolerance * norm, name


@contextmanager
def count_fused():
    """Yields a list that grows by one with each fused call of a layer, alone or in a block."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return dora_linear(*args, **kwargs)

    def counted_mlp(x, *members, **kwargs):
        calls.extend([kwargs] * sum(member is not None for member in members))
        return dora_mlp(x, *members, **kwargs)

    def counted_siblings(x, members, **kwargs):
        calls.extend([kwargs] * len(members))
        return dora_siblings(x, members, **kwargs)

    dora_linear, dora_mlp, dora_siblings = peft_linear.dora_linear, mlp.dora_mlp, siblings.dora_siblings
    with (
        patch.object(peft_linear, "dora_linear", counted),
        patch.object(mlp, "dora_mlp", counted_mlp),
        patch.object(siblings, "dora_siblings", counted_siblings),
    ):
        yield calls


@contextmanager
def frozen_magnitude():
    """An engine with one fault, the one that others had: the magnitude silently does not train."""
    backward = DoraLinearFunction.backward

    def wrong(ctx, grad_y):
        gradients = list(backward(ctx, grad_y))
        gradients[4] = torch.zeros_like(gradients[4])
        return tuple(gradients)

    with patch.object(DoraLinearFunction, "backward", staticmethod(wrong)):
        yield
