"""`DoraConv` and `DoraEmbedding`: each starts as the layer it came from, trains its adapter alone, and merges."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dora_kernels as dk
from dora_kernels.layers.conv import DoraConv
from dora_kernels.layers.embedding import DoraEmbedding
from tests.support.oracle import relative_error
from tests.tolerances import MERGED_LOGITS

IMPLS = pytest.mark.parametrize("impl", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
BASES = {
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "conv3d": lambda: nn.Conv3d(4, 6, 2),
    "embedding": lambda: nn.Embedding(11, 8, padding_idx=0),
}
UNMERGED = {
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
}
KINDS = pytest.mark.parametrize("kind", [*BASES, *UNMERGED])
MERGED = pytest.mark.parametrize("kind", BASES)


def make_base(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return (BASES | UNMERGED)[kind]().to(dtype)


def adapted(base, trained=True, **options):
    layer = (DoraEmbedding if isinstance(base, nn.Embedding) else DoraConv)(base, r=4, lora_alpha=8, **options)
    if trained:
        with torch.no_grad():
            for parameter in (layer.lora_A, layer.lora_B):
                parameter.normal_(std=0.1)
            layer.magnitude.mul_(1 + 0.2 * torch.randn_like(layer.magnitude))
    return layer


def input_of(base):
    if isinstance(base, nn.Embedding):
        return torch.randint(0, base.num_embeddings, (2, 5))
    return torch.randn(2, base.in_channels, *[6] * (base.weight.ndim - 2)).to(base.weight.dtype)


@KINDS
@IMPLS
@DTYPES
def test_a_fresh_layer_is_an_exact_no_op(kind, impl, dtype):
    base = make_base(kind, dtype)
    if getattr(base, "bias", None) is not None:
        nn.init.zeros_(base.bias)
    x, layer = input_of(base), adapted(base, trained=False, impl=impl).eval()
    with torch.no_grad():
        assert torch.equal(layer(x), base(x))


@KINDS
def test_the_base_is_shared_and_frozen(kind):
    base = make_base(kind)
    layer = adapted(base)
    assert layer.weight is base.weight
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B", "magnitude"}
    assert set(base.state_dict()) <= set(layer.state_dict()), "the base model's keys stay"
    for name in ("kernel_size", "stride", "padding", "embedding_dim", "num_embeddings", "padding_idx"):
        assert getattr(layer, name, None) == getattr(base, name, None), "models read them off their layers"


@KINDS
def test_training_moves_all_of_the_adapter(kind):
    base = make_base(kind)
    layer, x = adapted(base, trained=False), input_of(base)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    optimizer, target = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1), layer(x).sin()
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), target.detach())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in ("weight", "bias")), name


@MERGED
@DTYPES
def test_to_plain_computes_what_forward_does(kind, dtype):
    base = make_base(kind, dtype)
    layer, x = adapted(base, salt=5).eval(), input_of(base)
    merged = layer.to_plain()
    assert type(merged) is type(base)
    with torch.no_grad():
        assert relative_error(merged(x), layer(x)) < MERGED_LOGITS[dtype]
        assert relative_error(merged(x), base(x)) > 0.05, "the adapter matters"


@pytest.mark.parametrize("kind", UNMERGED)
def test_what_no_weight_computes_is_not_merged(kind):
    with pytest.raises(ValueError, match=r"cannot be merged: it (has 2 groups|pads by)"):
        adapted(make_base(kind)).to_plain()


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer))}


@KINDS
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_computes_the_same_and_is_its_own(kind, duplicate):
    base = make_base(kind)
    layer, x = adapted(base).eval(), input_of(base)
    twin = duplicate(layer)
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(twin(x), before)
        twin.magnitude.mul_(2)
        assert torch.equal(layer(x), before)
    assert repr(twin) == repr(layer)


@KINDS
def test_the_norm_is_taken_once_inside_frozen_adapters(kind, monkeypatch):
    base = make_base(kind)
    layer, x = adapted(base).eval(), input_of(base)
    with torch.no_grad():
        expected = layer(x)
        with dk.frozen_adapters(layer):
            layer.lora_B.mul_(1)
            kept = layer.frozen_scale
            layer.frozen_scale = kept._replace(norm=2 * kept.norm, scale=kept.scale / 2)
            halved = layer(x)
        assert not torch.allclose(halved, expected), "the kept norm is the one that is used"
        assert torch.equal(layer(x), expected)


@KINDS
def test_it_says_what_it_runs(kind):
    (line,) = str(dk.explain(adapted(make_base(kind)), tokens=4)).splitlines()
    space = "token" if kind in (*UNMERGED, "embedding") else "weight"
    assert f"{space} space: " in line and "r=4" in line


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


BAD = {
    "rank_0": (lambda: DoraConv(nn.Conv1d(2, 2, 1), r=0, lora_alpha=1), ValueError, "`r` should be a positive"),
    "rank": (lambda: DoraConv(nn.Conv1d(4, 4, 1, groups=4), r=6, lora_alpha=1), ValueError, "4 groups.* r is 6"),
    "class": (lambda: DoraConv(nn.Linear(2, 2), r=1, lora_alpha=1), TypeError, "nn.Conv3d, got Linear"),
    "transposed": (lambda: DoraConv(nn.ConvTranspose1d(2, 2, 1), r=1, lora_alpha=1), TypeError, "got ConvTranspose1d"),
    "dilated_same": (
        lambda: DoraConv(nn.Conv1d(2, 2, 3, dilation=2, padding="same"), r=1, lora_alpha=1),
        ValueError,
        "is dilated with padding",
    ),
    "max_norm": (
        lambda: DoraEmbedding(nn.Embedding(3, 2, max_norm=1.0), r=1, lora_alpha=1),
        ValueError,
        "max_norm=1.0",
    ),
    "sparse": (
        lambda: DoraEmbedding(nn.Embedding(3, 2, sparse=True), r=1, lora_alpha=1),
        ValueError,
        "sparse gradients",
    ),
    "own_forward": (lambda: DoraEmbedding(Scaled(3, 2), r=1, lora_alpha=1), ValueError, "a forward of its own"),
    "no_embedding": (lambda: DoraEmbedding(nn.Linear(2, 2), r=1, lora_alpha=1), TypeError, "nn.Embedding, got Linear"),
}


@pytest.mark.parametrize(("make", "kind", "message"), BAD.values(), ids=BAD)
def test_errors(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
