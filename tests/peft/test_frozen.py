"""`frozen_adapters` on patched PEFT models: the same outputs from one norm per layer, never another adapter's norm."""

import copy
import pickle

import peft
import pytest
import torch

from dora_kernels.layers.frozen import Freezable, frozen_adapters
from dora_kernels.peft import patch_peft, unpatch_peft
from tests.support.buffers import count_launches
from tests.support.oracle import relative_error
from tests.support.peft_models import assert_close, count_fused, dora_config, infer, peft_model, trained, twins
from tests.tolerances import TWIN

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NORM_KERNELS = {"_weight_norm_kernel", "_weight_norm_finish_kernel"}
KERNELS = {"token": "_rescale_fwd_kernel", "weight": "_merge_scale_kernel"}
LAYERS = {"llama": 14, "gpt2": 8}


def patched_model(*args, **options):
    model = peft_model(*args).eval()
    patch_peft(model, **options)
    return model


def frozen_layers(model):
    return sum(isinstance(module, Freezable) and module.frozen_scale is not None for module in model.modules())


@pytest.mark.parametrize("space", KERNELS)
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float32)], ids=str)
def test_the_same_outputs_without_a_norm(family, dtype, space):
    """To the last bit but in weight space, where another kernel computes W'; two layers pass its sums' order on."""
    tolerance = 2 * TWIN[dtype] if space == "weight" else 0.0
    model = patched_model(family, dtype, impl="triton", space=space)
    expected = infer(model)["logits"]
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    with frozen_adapters(model) as same, count_launches() as launches:
        assert same is model
        for _ in range(2):
            assert relative_error(infer(model)["logits"], expected) <= tolerance
    assert launches[KERNELS[space]] == 2 * LAYERS[family]
    assert not NORM_KERNELS & launches.keys()
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    with count_launches() as launches:
        infer(model)
    assert launches["_weight_norm_kernel"] == LAYERS[family]


def test_weights_changed_between_two_scopes_are_seen():
    model = patched_model()
    with frozen_adapters(model):
        before = infer(model)["logits"]
    trained(model, seed=9)
    expected = infer(model)["logits"]
    assert not torch.allclose(before, expected)
    with frozen_adapters(model):
        assert torch.equal(infer(model)["logits"], expected)


def _other(model):
    model.set_adapter("other")
    return infer(model)


def _both(model):
    model.base_model.set_adapter(["default", "other"])
    return infer(model)


def _disabled(model):
    with model.disable_adapter():
        return infer(model)


def _rescaled(model):
    with peft.helpers.rescale_adapter_scale(model, 0.5):
        return infer(model)


def _made_again(model):
    model.delete_adapter("default")
    torch.manual_seed(2)
    model.add_adapter("default", dora_config(r=3))
    trained(model, seed=4)
    model.set_adapter("default")
    return infer(model.eval())


def _there_and_back(model):
    _other(model)
    model.set_adapter("default")
    return infer(model)


# What PEFT lets one do to a model, and how many calls are fused.
ACTS = {
    "another_adapter": (_other, 14),
    "two_active_adapters": (_both, 0),
    "disabled": (_disabled, 0),
    "rescaled": (_rescaled, 14),
    "made_again_under_the_same_name": (_made_again, 14),
    "there_and_back": (_there_and_back, 28),
}


@pytest.mark.parametrize(("act", "fused"), ACTS.values(), ids=ACTS)
def test_acts_inside_mean_what_they_mean_outside(act, fused):
    plain, patched = twins()
    for model in (plain, patched):
        torch.manual_seed(1)
        model.add_adapter("other", dora_config())
        trained(model, seed=5, adapter="other").eval()
    patch_peft(patched)
    expected, at_rest = act(plain), infer(patched)
    with frozen_adapters(patched):
        assert frozen_layers(patched) == 14
        assert_close(infer(patched), at_rest)
        with count_fused() as calls:
            assert_close(act(patched), expected)
    assert len(calls) == fused


REFUSED = {
    "train": (lambda model: model.train(), "cannot train inside frozen_adapters"),
    "load_state_dict": (lambda model: model.load_state_dict(model.state_dict()), "cannot load weights inside"),
    "convert": (lambda model: model.float(), "cannot move or convert the model inside"),
    "merge": (lambda model: model.merge_adapter(), "cannot merge inside"),
    "merge_and_unload": (lambda model: model.merge_and_unload(), "cannot merge inside"),
    "unpatch": (unpatch_peft, "cannot unpatch inside"),
    "nested": (lambda model: frozen_adapters(model).__enter__(), "frozen already"),
    "gradients": (lambda model: model(torch.arange(4)[None]), "frozen_scale is for inference"),
}


@pytest.mark.parametrize(("act", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_inside(act, message):
    model = patched_model()
    expected = infer(model)["logits"]
    with frozen_adapters(model):
        with pytest.raises((RuntimeError, ValueError), match=message):
            act(model)
        with count_fused() as calls:
            assert torch.equal(infer(model)["logits"], expected), "and changes nothing"
        assert len(calls) == frozen_layers(model) == 14
    assert frozen_layers(model) == 0
    model.train()
    unpatch_peft(model)


def test_loading_an_adapters_weights_inside_is_refused(tmp_path):
    model = patched_model()
    trained(peft_model(), seed=7).save_pretrained(tmp_path)
    with frozen_adapters(model), pytest.raises(RuntimeError, match="cannot load weights inside"):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_made_inside_is_free(duplicate):
    model = patched_model()
    with frozen_adapters(model):
        twin = duplicate(model)
    assert frozen_layers(twin) == 0
    twin.train()
    unpatch_peft(twin)


def test_what_is_left_to_peft_stays_so():
    model = patched_model()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_A["default"].register_forward_hook(lambda *_: None)
    expected = infer(model)["logits"]
    with frozen_adapters(model):
        assert frozen_layers(model) == 13
        assert torch.equal(infer(model)["logits"], expected)


def test_merged_before_is_merged_inside():
    model = patched_model()
    model.merge_adapter()
    expected = infer(model)["logits"]
    with frozen_adapters(model):
        assert frozen_layers(model) == 0
        assert torch.equal(infer(model)["logits"], expected)


def test_an_unpatched_model_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="patch_peft on a PEFT model"), frozen_adapters(peft_model().eval()):
        pass
