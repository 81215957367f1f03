"""`frozen_adapters`: the same outputs from one norm per layer, and nothing that could make that norm stale."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dora_kernels as dk
from dora_kernels.layers.frozen import frozen_adapters
from tests.support.buffers import count_launches
from tests.support.oracle import relative_error
from tests.tolerances import TWIN

SPACES = pytest.mark.parametrize("space", ["token", "weight"])
NORM_KERNELS = {"_weight_norm_kernel", "_weight_norm_finish_kernel"}


def make_model(layers=3, **options):
    model = nn.Sequential(
        *(dk.DoraLinear.from_linear(nn.Linear(24, 24), r=3, lora_alpha=6, salt=i, **options) for i in range(layers))
    )
    for layer in model:
        nn.init.normal_(layer.lora_B, std=0.1)
        layer.magnitude.data *= 1.3
    return model.eval()


@SPACES
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_outputs_are_the_same(dtype, impl, space):
    """To the last bit, except where W' comes from another kernel than the one that also computes the norm: its blocks
    have another shape, and with it B A sums its products in another order."""
    tolerance = TWIN[dtype] if (impl, space) == ("triton", "weight") else 0.0
    linear = nn.Linear(40, 33, dtype=dtype)
    layer = dk.DoraLinear.from_linear(linear, r=3, lora_alpha=6, space=space, impl=impl).eval()
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(2, 7, 40, dtype=dtype)
    with torch.no_grad():
        plain = layer(x)
        with frozen_adapters(layer):
            assert relative_error(layer(x), plain.double()) <= tolerance
        assert torch.equal(layer(x), plain)


@SPACES
def test_the_norm_is_computed_once_per_layer(space):
    model, x = make_model(space=space, impl="triton"), torch.randn(5, 24)
    with torch.no_grad():
        with count_launches() as entering:
            scope = frozen_adapters(model)
            scope.__enter__()
        assert entering["_weight_norm_kernel"] == len(model)
        with count_launches() as inside:
            for _ in range(3):
                model(x)
        scope.__exit__(None, None, None)
        assert inside, "the kernels did run"
        assert not NORM_KERNELS & inside.keys()
        with count_launches() as after:
            model(x)
    assert after["_weight_norm_kernel"] == len(model)


def test_a_stale_norm_dies_with_the_scope():
    model, x = make_model(), torch.randn(5, 24)
    with torch.no_grad():
        with frozen_adapters(model):
            before = model(x)
        for layer in model:
            layer.lora_B.data.mul_(3.0)
        fresh = model(x)
        assert not torch.allclose(fresh, before)
        with frozen_adapters(model):
            assert torch.equal(model(x), fresh), "entered again, it is computed again"


def test_a_conversion_that_changes_nothing_is_let_through():
    """Some models call `.to` on a part of theirs in each forward."""
    model, x = make_model(), torch.randn(5, 24)
    with torch.no_grad():
        plain = model(x)
        with frozen_adapters(model):
            assert torch.equal(model.to("cpu").float()(x), plain)
            assert all(layer.frozen_scale is not None for layer in model)


FORBIDDEN = {
    "train": (lambda model, x: model.train(), "cannot train inside frozen_adapters"),
    "load_state_dict": (lambda model, x: model.load_state_dict(model.state_dict()), "cannot load weights inside"),
    "convert": (lambda model, x: model.double(), "cannot move or convert the model inside"),
    "nested": (lambda model, x: frozen_adapters(model).__enter__(), "frozen already"),
    "nested_in_part": (lambda model, x: frozen_adapters(model[1]).__enter__(), "frozen already"),
    "gradients": (lambda model, x: model(x), "frozen_scale is for inference"),
}


@pytest.mark.parametrize(("act", "message"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_is_refused_inside(act, message):
    model, x = make_model(), torch.randn(5, 24)
    with torch.no_grad():
        plain = model(x)
    with frozen_adapters(model):
        with pytest.raises((RuntimeError, ValueError), match=message):
            act(model, x)
        with torch.no_grad():
            assert torch.equal(model(x), plain), "and changes nothing"
            assert all(layer.frozen_scale is not None for layer in model)
    assert all(layer.frozen_scale is None for layer in model)


def test_eval_is_no_training():
    model = make_model()
    with frozen_adapters(model):
        model.eval()


def test_leaving_by_an_exception_forgets():
    model = make_model()
    with pytest.raises(KeyError), frozen_adapters(model):
        raise KeyError
    assert all(layer.frozen_scale is None for layer in model)
    model.train()


def test_an_exception_on_entering_forgets():
    model = make_model()
    model[2].magnitude = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError), frozen_adapters(model):
        pass
    assert all(layer.frozen_scale is None for layer in model)


def test_a_training_model_is_refused():
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"), frozen_adapters(make_model().train()):
        pass


def test_a_model_without_adapters_is_refused():
    with (
        pytest.raises(ValueError, match="found no DoRA layer of this engine: call apply_dora first"),
        frozen_adapters(nn.Linear(3, 3)),
    ):
        pass


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_made_inside_is_not_frozen_for_ever(duplicate):
    model = make_model()
    with frozen_adapters(model):
        twin = duplicate(model)
    twin.train()
