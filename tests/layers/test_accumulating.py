"""Inside `accumulating` n and g, on request W' too, outlive a call but no change of A, B or m; nothing else differs."""

import copy
import pickle
import sys
from collections import Counter
from functools import partial

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dora_kernels as dk
from dora_kernels.ops import reference
from tests.layers.test_stale_norms import WAYS
from tests.support.few_programs import few_programs  # noqa: F401 (a fixture)
from tests.support.marks import slow
from tests.support.peft_models import dora_config
from tests.support.tiny_models import VOCAB, llama

SIZE = 24
TOKENS = torch.arange(14).reshape(2, 7) * 11 % VOCAB


@pytest.fixture
def norms(monkeypatch):
    """How often n was computed."""
    made = Counter()

    def counted(function, *rooms):
        def call(*args, **options):
            made["computed"] += options.get("norm_scale") is None
            return function(*args, **options)

        for room in rooms:
            monkeypatch.setattr(room, function.__name__, call)

    # Of merges those that are not given it. `reference.kept_norm` is the function, which hides its module.
    counted(reference.merge, reference)
    callers = [sys.modules[f"dora_kernels.ops.reference.{name}"] for name in ("kept_norm", "stacked_norm")]
    counted(reference.weight_norm, reference, *callers)
    return made


def ours(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False))
    dk.apply_dora(model, dk.DoraConfig(r=3, lora_alpha=6, target_modules=["0", "1"], **options))
    for layer in model:
        nn.init.normal_(layer.lora_B, std=0.1)
    return model.train(), model[0].lora_A, model[0].lora_B, model[0].magnitude, model[0].weight


def patched(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False))
    model = peft.get_peft_model(model, dora_config(target_modules=["0", "1"]))
    dk.patch_peft(model, **options)
    for index in (0, 1):
        nn.init.normal_(model.base_model.model[index].lora_B["default"].weight, std=0.1)
    layer = model.base_model.model[0]
    factors = (part["default"].weight for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    return model.train(), *factors, layer.base_layer.weight


def gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y, *(parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad)]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


every_keeping = pytest.mark.parametrize("keep_weights", [False, True], ids=["norms", "weights"])
every_make = pytest.mark.parametrize("make", [ours, patched])
every_space = pytest.mark.parametrize("space", ["token", "weight"])


@every_space
@pytest.mark.parametrize("impl", ["reference", "triton"])
@every_keeping
@every_make
def test_steps_of_several_micro_steps_are_those_without_it(make, keep_weights, impl, space):
    model, twin = make(space=space, impl=impl)[0], make(space=space, impl=impl)[0]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, twin)]
    x = torch.randn(2, 3, 5, SIZE)
    with dk.accumulating(model, keep_weights=keep_weights):
        for step in range(2):
            for micro in range(3):
                assert_same(gradients(model, x[step, micro]), gradients(twin, x[step, micro]))
            for optimizer in optimizers:
                optimizer.step()


@every_space
@every_make
def test_norms_are_computed_once_a_step(make, space, norms):
    model, _, lora_B, *_ = make(space=space, impl="reference")
    x = torch.randn(5, SIZE)
    norms.clear()
    with dk.accumulating(model):
        for _ in range(3):
            gradients(model, x)
            assert norms["computed"] == 2
        with torch.no_grad():
            lora_B.add_(0.1)
        gradients(model, x)
        gradients(model, x)
        assert norms["computed"] == 3
    gradients(model, x)
    assert norms["computed"] == 5


@pytest.mark.parametrize("index", [1, 2, 3], ids=["A", "B", "m"])
@every_make
@every_keeping
@pytest.mark.parametrize("way", WAYS)
def test_no_change_escapes(way, keep_weights, make, index):
    made = make(space="weight" if keep_weights else "auto")
    model, parameter, x = made[0], made[index], torch.randn(5, SIZE)
    with dk.accumulating(model, keep_weights=keep_weights):
        before = gradients(model, x)[0]
        model.zero_grad()
        WAYS[way][0](parameter)
        parameter.requires_grad_()
        expected = gradients(copy.deepcopy(model), x)
        assert not torch.allclose(expected[0], before, rtol=1e-6), "it changes the output"
        assert_same(gradients(model, x), expected)


@every_keeping
@every_make
def test_checkpointed_layers(make, keep_weights):
    space = "weight" if keep_weights else "auto"
    model, twin, x = make(space=space)[0], make(space=space)[0], torch.randn(5, SIZE)

    def run(m):
        return gradients(lambda x: checkpoint(m, x, use_reentrant=False), x)

    def gradients(function, x):
        model.zero_grad(), twin.zero_grad()
        y = function(x)
        y.square().sum().backward()
        return [y, *(p.grad for m in (model, twin) for p in m.parameters() if p.grad is not None)]

    with dk.accumulating(model, keep_weights=keep_weights):
        for _ in range(2):
            assert_same(run(model), run(twin))


def _keeps_products(context, operation, *args, **options):
    kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.mul.Tensor)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@every_space
def test_a_selective_checkpoint_runs_as_without_it(space):
    """Its recomputation runs the operations of the forward, those of the norm among them."""
    contexts = partial(create_selective_checkpoint_contexts, _keeps_products)
    model, twin = ours(space=space)[0], ours(space=space)[0]
    model[0].bias = twin[0].bias = None
    x = torch.randn(5, SIZE)
    with dk.accumulating(model, keep_weights=True):
        for _ in range(2):
            found = []
            for m in (model, twin):
                m.zero_grad()
                checkpoint(m, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
                found.append([p.grad.clone() for p in m.parameters() if p.requires_grad])
            assert_same(*found)


@pytest.mark.parametrize(
    ("space", "keep_weights", "impl"),
    [
        *((space, keeping, "reference") for space in ("token", "weight") for keeping in (False, True)),
        *((*case, "triton") for case in (("token", False), ("weight", True))),
        *(slow(*case, "triton") for case in (("token", True), ("weight", False))),
    ],
)
def test_blocks_of_layers(space, impl, keep_weights, norms):
    """A gated MLP as one function, and q, k and v as one group."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(dk.apply_dora(llama(layers=1), dk.DoraConfig(r=2, space=space, impl=impl)).train())
    model, twin = models

    def gradients(m):
        m.zero_grad()
        loss = m(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        return [loss, *(p.grad.clone() for p in m.parameters() if p.requires_grad)]

    def move(m):
        with torch.no_grad():
            for parameter in m.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)

    expected = []
    for _ in range(2):
        expected += [gradients(twin), gradients(twin)]
        move(twin)
    norms.clear()
    found = []
    with dk.accumulating(model, keep_weights=keep_weights):
        for _ in range(2):
            found += [gradients(model), gradients(model)]
            move(model)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert norms["computed"] == (14 if impl == "reference" else 0)


@every_keeping
@pytest.mark.parametrize(
    ("impl", "training"), [("reference", False), ("reference", True), slow("triton", False), ("triton", True)]
)
def test_an_evaluation_in_between(impl, keep_weights, training):
    """In inference mode, before the first training call, and before A, B and m change."""
    options = {"impl": impl, "space": "weight" if keep_weights else "auto"}
    model, twin = (dk.apply_dora(llama(layers=1), dk.DoraConfig(r=2, **options)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    losses = []
    with dk.accumulating(model, keep_weights=keep_weights):
        for m in (model, twin):
            with torch.inference_mode():
                m.train(training)(input_ids=TOKENS)
            with torch.no_grad():
                for name, parameter in m.named_parameters():
                    if name.endswith("lora_B"):
                        parameter.add_(1.0)
            losses.append(m.train()(input_ids=TOKENS, labels=TOKENS).loss)
    assert torch.equal(*losses)


@every_keeping
def test_another_scaling(keep_weights):
    model, x = ours(space="weight" if keep_weights else "auto")[0], torch.randn(5, SIZE)
    with dk.accumulating(model, keep_weights=keep_weights):
        gradients(model, x)
        model[0].lora_alpha *= 3
        expected = gradients(copy.deepcopy(model), x)
        assert_same(gradients(model, x), expected)


@every_make
def test_loading_frozen_weights_is_refused(make):
    model = make()[0]
    state = model.state_dict()
    adapter = {name: tensor for name, tensor in state.items() if "lora" in name or "magnitude" in name}
    with dk.accumulating(model):
        with pytest.raises(RuntimeError, match=r"cannot load .*weight inside accumulating"):
            model.load_state_dict(state)
        model.load_state_dict(adapter, strict=False)
        twin = copy.deepcopy(model)
    model.load_state_dict(state)
    twin.load_state_dict(state)


@every_make
def test_the_scope(make):
    model, x = make()[0], torch.randn(5, SIZE)
    layers = [module for module in model.modules() if hasattr(module, "output_use")]
    with dk.accumulating(model) as given:
        assert given is model
        model(x)
        assert all(layer.output_use.kept_norm is not None for layer in layers)
        with pytest.raises(RuntimeError, match="does not nest"), dk.accumulating(model):
            pass
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            uses = [module.output_use for module in twin.modules() if hasattr(module, "output_use")]
            assert uses and not any(use.keeps_norm or use.kept_norm for use in uses)
        assert all(layer.output_use.keeps_norm for layer in layers)
    assert not any(layer.output_use.keeps_norm or layer.output_use.kept_norm for layer in layers)
    with pytest.raises(KeyError), dk.accumulating(model):
        raise KeyError
    assert not any(layer.output_use.keeps_norm for layer in layers)


def test_a_model_without_such_layers():
    with pytest.raises(ValueError, match="found no DoRA layer"), dk.accumulating(nn.Linear(2, 2)):
        pass


def test_explain_says_where_nothing_is_kept():
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    dk.apply_dora(grouped, dk.DoraConfig(r=2, target_modules=["0"]))
    patched = peft.get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3)), dora_config(target_modules=["0"]))
    dk.patch_peft(patched, space="token")
    for model in (grouped, patched):
        with dk.accumulating(model.train(), keep_weights=True):
            assert all("accumulating keeps nothing of it" in each.plan.reason for each in dk.explain(model, tokens=4))
