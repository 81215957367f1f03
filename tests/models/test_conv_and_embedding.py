"""Embeddings and convolutions as targets: named they are adapted, merged and streamed; "all-linear" stays linear."""

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import dora_kernels as dk
from dora_kernels.layers.conv import DoraConv
from dora_kernels.layers.embedding import DoraEmbedding
from dora_kernels.models.modules import dora_layers
from tests.support.images import TARGETS, batch, image_model, trained
from tests.support.oracle import relative_error
from tests.support.tiny_models import assert_unchanged, llama, logits, snapshot
from tests.tolerances import SAME_FP32


def config(**fields):
    return dk.DoraConfig(**{"r": 4, "target_modules": TARGETS} | fields)


def test_named_targets_are_adapted_and_start_as_a_no_op():
    model, inputs = image_model().eval(), batch()
    with torch.no_grad():
        expected = model(*inputs)
        dk.apply_dora(model, config())
        assert {path: type(layer) for path, layer in dora_layers(model).items()} == {
            "patches": DoraConv, "local": DoraConv, "words": DoraEmbedding, "head": dk.DoraLinear
        }  # fmt: skip
        assert relative_error(model(*inputs), expected) <= SAME_FP32
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B", "magnitude"
    }  # fmt: skip


def test_all_linear_is_linear():
    model = dk.apply_dora(image_model(), config(target_modules="all-linear"))
    assert list(dora_layers(model)) == ["head"]


def test_the_writes_of_the_model_cost_no_gradient():
    """It writes in place over the output of a convolution without a bias, from which dm is read."""
    model = trained(dk.apply_dora(image_model(torch.float64), config()))
    model(*batch(torch.float64)).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.local.output_use.is_written = True
    model(*batch(torch.float64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert relative_error(found[name], parameter.grad) < 1e-12 and parameter.grad.any(), name


@pytest.mark.parametrize("keep_base", [False, True])
def test_merging_and_back(keep_base):
    model, inputs = trained(dk.apply_dora(image_model(), config())).eval(), batch()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(*inputs)
        merged = dk.merge_dora(model, keep_base=keep_base)
        assert relative_error(merged(*inputs), expected) <= SAME_FP32
    assert [type(getattr(merged, name)) for name in TARGETS] == [nn.Conv2d, nn.Conv2d, nn.Embedding, nn.Linear]
    assert merged.words.padding_idx == 0 and merged.local.bias is None
    if keep_base:
        back = dk.unmerge_dora(merged).state_dict()
        assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_streamed_weights_are_the_merged_ones():
    model = trained(dk.apply_dora(image_model(torch.bfloat16), config()))
    found = dict(dk.merged_weights(model))
    expected = dk.merge_dora(model).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_in_channels_last():
    model, inputs = trained(dk.apply_dora(image_model(), config())).eval(), batch()
    with torch.no_grad():
        expected = model(*inputs)
        model.to(memory_format=torch.channels_last)
        assert relative_error(model(*inputs), expected) <= SAME_FP32
        merged = dk.merge_dora(model)
        assert merged.local.weight.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(merged(*inputs), expected) <= SAME_FP32


def test_groups_are_adapted_but_not_merged():
    model = trained(dk.apply_dora(image_model(depthwise=True), config(r=8)))
    model(*batch()).sum().backward()
    assert model.local.lora_A.grad.any()
    for call in (dk.merge_dora, dk.merged_weights):
        with pytest.raises(ValueError, match="local cannot be merged: it has 8 groups and one lora_A"):
            call(model)
    assert isinstance(model.local, DoraConv)


REFUSALS = {
    "rank": (lambda: image_model(depthwise=True), r"local \(Conv2d\) has 8 groups, .* multiple; r is 4"),
    "max_norm": (
        lambda: nn.ModuleDict({name: nn.Embedding(3, 2, max_norm=1.0) for name in TARGETS}),
        r"words \(Embedding\) has max_norm=1.0",
    ),
    "transposed": (
        lambda: nn.ModuleDict({name: nn.ConvTranspose1d(2, 2, 1) for name in TARGETS}),
        r"head \(ConvTranspose1d\) is a transposed convolution",
    ),
    "norm": (
        lambda: nn.ModuleDict({name: nn.LayerNorm(2) for name in TARGETS}),
        r"head \(LayerNorm\) is no linear layer, convolution or embedding",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refused_and_unchanged(make, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        dk.apply_dora(model, config())
    assert_unchanged(model, before)


def test_a_vision_towers_patch_embedding():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)).eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(pixels).logits
        dk.apply_dora(model, config(target_modules=["projection", "q_proj"]))
        assert relative_error(model(pixels).logits, expected) <= SAME_FP32
        trained(model)
        expected = model(pixels).logits
        assert relative_error(dk.merge_dora(model)(pixels).logits, expected) <= SAME_FP32


@pytest.mark.filterwarnings("ignore:.*no longer tied after merging")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapted_embedding_leaves_its_tied_head_alone(tied):
    model = trained(dk.apply_dora(llama(tied=tied), config(target_modules=["embed_tokens", "q_proj"])))
    head, expected = model.lm_head.weight.detach().clone(), logits(model)
    merged = dk.merge_dora(model)
    assert relative_error(logits(merged), expected) <= SAME_FP32
    assert torch.equal(merged.lm_head.weight, head)
    assert merged.config.tie_word_embeddings is False
