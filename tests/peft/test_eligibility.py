"""A fused layer remembers that it is one, for itself alone and for as long as it is one."""

import copy
import pickle
from unittest.mock import patch

import peft
import pytest
import torch
from torch import nn

from dora_kernels.peft import eligibility, patch_peft
from dora_kernels.peft import layer as fused_layer
from tests.support.nf4 import linear_4bit
from tests.support.oracle import relative_error
from tests.support.peft_layer import X, call, config, layer_of, peft_model
from tests.support.peft_models import FP64, count_fused


def test_what_is_undone_is_fused_again():
    model = peft_model()
    patch_peft(model)
    expected, _ = call(model)
    for do, undo in (
        (lambda: model.merge_adapter(), lambda: model.unmerge_adapter()),
        (lambda: model.base_model.disable_adapter_layers(), lambda: model.base_model.enable_adapter_layers()),
        (lambda: model.set_adapter("other"), lambda: model.set_adapter("default")),
    ):
        do()
        call(model)
        undo()
        found, is_fused = call(model)
        assert is_fused and relative_error(found, expected) < FP64


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer))}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_is_asked_for_itself(duplicate):
    model = peft_model()
    patch_peft(model)
    expected, _ = call(model)
    twin = duplicate(layer_of(model))
    assert twin.dora_fusion.remembered is None
    twin.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    assert eligibility.fused_adapter(twin) is None
    found, is_fused = call(model)
    assert is_fused and torch.equal(found, expected)


def make_4bit():
    model = nn.Sequential(linear_4bit(torch.randn(48, 64)))
    model.is_loaded_in_4bit = True
    return peft.get_peft_model(model, config()).eval(), torch.randn(5, 64)


BASES = {"dense": lambda: (peft_model(), X), "nf4": make_4bit}


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_a_second_call_walks_nothing_and_reads_the_weight_once(make):
    model, x = make()
    patch_peft(model)
    assert call(model, x)[1]
    walks = patch.object(eligibility, "why_left_to_peft", wraps=eligibility.why_left_to_peft)
    reads = patch.object(fused_layer, "weight_of", wraps=fused_layer.weight_of)
    others = patch.object(eligibility, "weight_of", wraps=eligibility.weight_of)
    with walks as walked, reads as read, others as read_by_the_walk:
        assert call(model, x)[1]
    assert (walked.call_count, read.call_count, read_by_the_walk.call_count) == (0, 1, 0)


def test_a_weight_that_its_library_repacked_since_is_left_to_peft():
    """bitsandbytes does so in place: no state of the layer tells."""
    model, x = make_4bit()
    patch_peft(model)
    assert call(model, x)[1]
    layer_of(model).base_layer.weight.quant_state.packing_format_for_cpu = True
    with count_fused() as calls, patch.object(type(layer_of(model)).peft_class, "forward", lambda self, x: x):
        model(x)
    assert not calls
