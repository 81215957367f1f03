"""Which layers "all-linear" takes, leaves out with a warning, or says nothing of."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import dora_kernels as dk
from dora_kernels.layers.support import why_not
from tests.support.tiny_models import VOCAB, llama, logits
from tests.tolerances import SAME_FP32


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Apart(nn.Linear):
    """x Wᵀ + b in an order of its own, as Falcon's layers compute it."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Switched(nn.Linear):
    """A plain layer until a setting makes it another."""

    def __init__(self, *sizes, gain=1.0):
        super().__init__(*sizes)
        self.gain = gain

    def forward(self, x):
        return self.gain * F.linear(x, self.weight, self.bias)


class OnlyInEval(nn.Linear):
    def forward(self, x):
        return super().forward(x) if not self.training else super().forward(x) + 1


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (Apart(8, 6), True),
        (Switched(8, 6), True),
        (Switched(8, 6, gain=2.0), False),
        (OnlyInEval(8, 6), False),
        (Scaled(8, 6), False),
    ],
    ids=["apart", "gain 1", "gain 2", "only in eval", "scaled"],
)
def test_a_class_is_known_by_what_it_computes(layer, taken):
    assert (why_not(layer) is None) == taken


def test_falcon_is_adapted():
    config = FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    model = FalconForCausalLM(config).eval()
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dk.apply_dora(model, dk.DoraConfig(r=2))
    assert len(dk.explain(model, tokens=8)) == 4
    assert (logits(model) - before).abs().max() <= SAME_FP32 * before.abs().max()


def test_what_all_linear_leaves_out_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2), Scaled(8, 8))
    with pytest.warns(UserWarning, match=r"leaves out 2 layers: 1.out_proj is not always called.*2 has a forward"):
        dk.apply_dora(model, dk.DoraConfig(r=2))
    assert [type(module).__name__ for module in (model[0], model[2])] == ["DoraLinear", "Scaled"]


def test_a_mamba_model_keeps_the_layers_that_are_called():
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.warns(UserWarning, match=r"leaves out 3 layers.*dt_proj.*out_proj.*x_proj"):
        dk.apply_dora(model, dk.DoraConfig(r=2))
    assert isinstance(model.backbone.layers[0].mixer.in_proj, dk.DoraLinear)


def test_where_nothing_is_left_it_is_an_error():
    with pytest.raises(ValueError, match=r"cannot be adapted: 0 .Scaled. has a forward of its own"):
        dk.apply_dora(nn.Sequential(Scaled(8, 8)), dk.DoraConfig(r=2))


def test_what_the_user_can_mend_is_refused_all_the_same():
    model = llama()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *arguments: None)
    with pytest.raises(ValueError, match="register them after apply_dora"):
        dk.apply_dora(model, dk.DoraConfig(r=2))


def test_fused_experts_stay_frozen_and_it_is_said():
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    frozen = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    with pytest.warns(UserWarning, match=f"adapts no expert: {frozen} parameters of fused experts stay frozen"):
        dk.apply_dora(model, dk.DoraConfig(r=2))
    last = str(dk.explain(model, tokens=8)).splitlines()[-2]
    assert last == f"model.layers.0.mlp.experts: {frozen} parameters of fused experts stay frozen"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dk.apply_dora(MixtralForCausalLM(config), dk.DoraConfig(r=2, target_modules=["q_proj"]))


def of_fp8():
    layer = nn.Linear(8, 6)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [(of_fp8, "dtype torch.float8_e4m3fn"), (lambda: parametrizations.weight_norm(nn.Linear(8, 6)), "computes its")],
    ids=["FP8", "parametrized"],
)
def test_from_linear_refuses_a_weight_that_it_does_not_understand(layer, message):
    with pytest.raises(ValueError, match=message):
        dk.DoraLinear.from_linear(layer(), r=2, lora_alpha=4)
