"""Trained state that a save or a cast would lose is warned of."""

import copy
import warnings

import pytest
import torch
from torch import nn

import dora_kernels as dk
from tests.support.tiny_models import llama


def adapted(**fields):
    return dk.apply_dora(llama(), dk.DoraConfig(r=2, target_modules=["q_proj"], **fields))


def test_save_pretrained_says_that_it_loads_as_the_base(tmp_path):
    model = adapted()
    for each in (model, copy.deepcopy(model)):
        with pytest.warns(UserWarning, match="from_pretrained reads the base alone"):
            each.save_pretrained(tmp_path)
    assert copy.deepcopy(model).save_pretrained.__self__ is not model


def test_a_merged_model_is_saved_without_a_word(tmp_path):
    model = dk.merge_dora(adapted(), keep_base=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    dk.unmerge_dora(model)
    with pytest.warns(UserWarning, match="save the adapter with dora_kernels.save_adapter"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("order", ["cast, then train", "train, then cast"])
def test_magnitudes_cast_to_16_bits(order):
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.train().eval()
        model.double().float()
    with pytest.warns(UserWarning, match="magnitudes are stored in 16 bits"):
        if order == "cast, then train":
            model.to(torch.bfloat16).train()
        else:
            model.train().to(torch.bfloat16)


def test_inference_in_16_bits_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted().half().eval()
        adapted().requires_grad_(False).half().train()


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(x))


def test_running_statistics_that_moved(tmp_path):
    def model(**fields):
        return dk.apply_dora(Convolutional(), dk.DoraConfig(r=2, target_modules=["head"], **fields))

    still, moved, saved = model().eval(), model().train(), model(modules_to_save=["norm"]).train()
    for each in (still, moved, saved):
        each(torch.randn(8, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dk.save_adapter(still, tmp_path / "still")
        dk.save_adapter(saved, tmp_path / "saved")
    with pytest.warns(UserWarning, match="1 BatchNorm layers moved their running statistics in training .norm for one"):
        dk.save_adapter(moved, tmp_path / "moved")
