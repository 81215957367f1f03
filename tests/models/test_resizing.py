"""The vocabulary of an adapted model: resized where no adapter has its size, else refused before anything changes."""

import copy

import pytest
import torch

import dora_kernels as dk
from tests.support.tiny_models import VOCAB, llama


def adapted(*targets):
    return dk.apply_dora(llama(), dk.DoraConfig(r=2, target_modules=[*targets]))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapted_embeddings_are_not_resized(target):
    model = adapted("q_proj", target)
    for each in (model, copy.deepcopy(model)):
        before = {name: tensor.clone() for name, tensor in each.state_dict().items()}
        with pytest.raises(
            ValueError, match=f"{target} has an adapter .* resize_token_embeddings first, then apply_dora"
        ):
            each.resize_token_embeddings(VOCAB + 6)
        assert all(torch.equal(before[name], tensor) for name, tensor in each.state_dict().items())
        assert len(each.resize_token_embeddings(VOCAB).weight) == VOCAB, "what changes nothing is not refused"


def test_the_rest_is_resized():
    model = adapted("q_proj")
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    assert model(torch.tensor([[VOCAB + 5]])).logits.shape[-1] == VOCAB + 6
    model = dk.merge_dora(adapted("lm_head"))
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    assert len(model.lm_head.weight) == VOCAB + 6
