"""Activation checkpointing recomputes each layer's forward: the gradients must be the same bits."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_kernels as dk
from tests.support.tiny_models import VOCAB, llama

REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])


@REENTRANT
@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stack_of_layers(dtype, space, use_reentrant):
    stack = nn.ModuleList(
        dk.DoraLinear.from_linear(
            nn.Linear(24, 24, dtype=dtype, bias=bias), r=3, lora_alpha=6, space=space, impl="triton", salt=salt
        )
        for salt, bias in enumerate((True, False, True))
    ).train()
    for layer in stack:
        nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(2, 5, 24, dtype=dtype)

    def run(call):
        stack.zero_grad()
        leaf = x.clone().requires_grad_()
        hidden = leaf
        for layer in stack:
            # With its activation: the output is then used where it was recomputed.
            hidden = call(lambda inputs, layer=layer: torch.sigmoid(layer(inputs)), hidden)
        hidden.float().sum().backward()
        return {"x": leaf.grad} | {name: parameter.grad for name, parameter in adapters(stack).items()}

    plain = run(lambda block, hidden: block(hidden))
    recomputed = run(lambda block, hidden: checkpoint(block, hidden, use_reentrant=use_reentrant))
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
        assert gradient.any(), f"{name} is compared, and not zero"


def adapters(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@REENTRANT
@pytest.mark.parametrize("rate", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_llama(impl, rate, use_reentrant):
    tokens = torch.arange(14).reshape(2, 7) * 11 % VOCAB
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        config = dk.DoraConfig(r=3, lora_alpha=6, lora_dropout=rate, impl=impl, target_modules="all-linear")
        model = dk.apply_dora(llama(torch.bfloat16, layers=1), config).train()
        for layer in model.modules():
            if isinstance(layer, dk.DoraLinear):
                nn.init.normal_(layer.lora_B, std=0.1)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in adapters(model).items()})
    plain, recomputed = gradients
    assert len(plain) == 3 * 7
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
        assert gradient.any(), f"{name} is compared, and not zero"
