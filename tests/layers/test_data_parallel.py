"""`nn.DataParallel`, which transformers' Trainer puts around a model where one process sees several GPUs.

torch replicates onto GPUs alone; here replicas are made as it makes them, on the CPU.
"""

import pytest
import torch

from dora_kernels.peft import patch_peft
from tests.support.merging import trained
from tests.support.peft_models import FP64, assert_close, count_fused, peft_model, step
from tests.support.tiny_models import FAMILIES, llama

pytestmark = pytest.mark.filterwarnings("ignore:Calling .zero_grad", "ignore:fan_in_fan_out")


def replica_of(model):
    """The model as one of `nn.DataParallel`'s workers gets it: parameters are plain attributes, and no leaves."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copy in copies.items():
        for name, child in module._modules.items():
            copy._modules[name] = copies.get(child)
        for name, parameter in module._parameters.items():
            if parameter is None:
                copy._parameters[name] = None
            else:
                setattr(copy, name, parameter.clone() if parameter.requires_grad else parameter.detach().clone())
    return copies[model]


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_replicas_of_a_patched_model_are_fused(family):
    model = peft_model(family)
    fused = len(patch_peft(model, impl="reference").fused)
    expected = step(model)
    model.zero_grad()
    with count_fused() as calls:
        logits = step(replica_of(model))["logits"]
    assert len(calls) == fused > 0
    assert_close({"logits": logits} | gradients(model), expected, FP64)


def test_replicas_of_our_layers_run_like_the_model():
    model = trained(llama(torch.float64)).train()
    expected = step(model)
    model.zero_grad()
    logits = step(replica_of(model))["logits"]
    assert_close({"logits": logits} | gradients(model), expected, FP64)
