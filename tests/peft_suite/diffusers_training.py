"""Diffusers' models train through `patch_peft` with PEFT's losses: a U-Net, and Flux's and SD3's transformers, tiny.

Run by `make peft-suite`, whose environment has diffusers: `pytest tests/peft_suite/diffusers_training.py`.
"""

import copy
import warnings

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import dora_kernels as dk
from tests.support.images import trained
from tests.tolerances import AFTER_ADAM

STEPS = 6


def unet():
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    # Those of diffusers' DreamBooth script, and the convolutions of the residual blocks, which it can name too.
    return model, ["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2", "conv_in"]


def flux():
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model, ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"]


def sd3():
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    return model, ["to_k", "to_q", "to_v", "to_out.0", "pos_embed.proj"]


def inputs_of(model):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    timestep = torch.tensor([3.0, 7.0])
    if isinstance(model, UNet2DConditionModel):
        return {"sample": normal(2, 4, 8, 8), "timestep": timestep, "encoder_hidden_states": normal(2, 5, 12)}
    if isinstance(model, SD3Transformer2DModel):
        words = {"encoder_hidden_states": normal(2, 5, 32), "pooled_projections": normal(2, 64)}
        return {"hidden_states": normal(2, 4, 8, 8), "timestep": timestep} | words
    words = {"encoder_hidden_states": normal(2, 5, 32), "pooled_projections": normal(2, 32)}
    places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    return {"hidden_states": normal(2, 16, 4), "timestep": timestep / 10} | words | places


def adapted(make):
    """A model with a trained adapter, as the scripts make it."""
    torch.manual_seed(0)
    model, targets = make()
    model.requires_grad_(False)
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets, use_dora=True)
    )
    return trained(model.train())


def losses(model):
    inputs = inputs_of(model)
    target = model(**inputs).sample.detach().sin()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for _ in range(STEPS):
        loss = torch.nn.functional.mse_loss(model(**inputs).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("make", [unet, flux, sd3], ids=lambda make: make.__name__)
def test_training_has_pefts_losses(make):
    model = adapted(make)
    expected, names = losses(copy.deepcopy(model)), get_peft_model_state_dict(model).keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = dk.patch_peft(model)
    assert report.fused and not report.skipped, report
    found = losses(model)
    assert found == pytest.approx(expected, rel=AFTER_ADAM)
    assert found[-1] < found[0]
    assert get_peft_model_state_dict(model).keys() == names, "diffusers saves what it saved"
