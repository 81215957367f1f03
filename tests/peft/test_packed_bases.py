"""PEFT over FP8, FP4 and int4: what it cannot build alone it builds inside `patched_peft`, over the decoded weight."""

import copy

import peft
import pytest
import torch
from torch import nn

import dora_kernels as dk
from dora_kernels.peft.packed_layer import PackedLoraLinear, decoded_linear
from tests.support.fp4 import KINDS as FP4
from tests.support.fp4 import linear_fp4
from tests.support.fp8 import decoded, linear_fp8
from tests.support.int4 import linear_awq, linear_compressed, linear_gptq
from tests.support.oracle import errors, exact, make_problem, relative_error
from tests.support.peft_models import dora_config, trained
from tests.tolerances import ORACLE_FP32, SAME_FP32, TWIN

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BF16, FP32 = torch.bfloat16, torch.float32


def fp8(N, K, dtype):
    layer = linear_fp8(N, K, bias=True)
    layer.bias.data = layer.bias.data.to(dtype)
    return layer, decoded(layer)


def gptq(N, K, dtype):
    return linear_gptq(N, K, 16, dtype, act_order=True, bias=True)


KINDS = {
    "fp8": fp8,
    "compressed_tensors": lambda N, K, dtype: linear_compressed(N, K, 16, dtype, symmetric=False),
    "gptq": gptq,
    "awq": lambda N, K, dtype: linear_awq(N, K, 16, dtype),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


class Base(nn.Module):
    def __init__(self, kind, dtype=FP32):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.up_weight = kind(64, 32, dtype)
        self.down, self.down_weight = kind(8, 64, dtype)
        # PEFT asks the first parameter for the model's device, and GPTQ's layers have none.
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

    def plain(self, x):
        """What it computes with its decoded weights."""
        for layer, weight in ((self.up, self.up_weight), (self.down, self.down_weight)):
            bias = layer.get_base_layer().bias if hasattr(layer, "get_base_layer") else layer.bias
            x = (x if weight is self.up_weight else torch.relu(x)) @ weight.T.to(x.dtype)
            x = x if bias is None else x + bias
        return x


def config(**options):
    return dora_config(target_modules=["up", "down"], **options)


def build(kind, dtype=FP32, **options):
    """Built inside the scope, which is left, and patched anew: the way to a model for a trainer of one's own."""
    base = Base(kind, dtype)
    with dk.patched_peft():
        model = peft.get_peft_model(base, config(**options))
    return model, base


def x_of(dtype=FP32):
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@every_kind
def test_peft_alone_cannot_build_it(kind):
    """Why there is something to mend: A and B become FP8, or a weight is looked for that is not there."""
    with pytest.raises((NotImplementedError, AttributeError, ValueError, RuntimeError)):
        peft.get_peft_model(Base(kind), config())
    # The refusal is PEFT's own again behind the scope.
    with dk.patched_peft():
        pass
    with pytest.raises((NotImplementedError, AttributeError, ValueError, RuntimeError)):
        peft.get_peft_model(Base(kind), config())


@every_kind
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_fresh_adapter_is_the_product_with_the_decoded_weight(kind, dtype):
    model, base = build(kind, dtype)
    assert dk.patch_peft(model, blocks=False).skipped == {}
    x = x_of(dtype)
    for layer, weight in ((base.up, base.up_weight), (base.down, base.down_weight)):
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert magnitude.dtype == FP32
        assert relative_error(magnitude, weight.double().norm(dim=1)) <= ORACLE_FP32
    assert torch.equal(model(x), base.plain(x))


@pytest.mark.parametrize("kind", FP4)
def test_over_fp4_as_over_a_matrix_in_bf16(kind):
    """Which the library makes of it whatever the model's dtype is."""
    model, base = build(lambda N, K, dtype: linear_fp4(kind, N, K), BF16)
    assert dk.patch_peft(model, blocks=False).skipped == {}
    x = x_of(BF16)
    assert torch.equal(model(x), base.plain(x))
    trained(model)
    assert relative_error(model(x), base.plain(x)) > 0.01
    with model.disable_adapter():
        assert torch.equal(model(x), base.plain(x))


@every_kind
def test_output_and_gradients_against_fp64(kind):
    torch.manual_seed(0)
    layer, weight = kind(40, 32, FP32)
    problem = make_problem(9, 40, 32, 5, FP32, bias=layer.bias is not None)
    root = nn.ModuleDict({"up": layer, "unused": nn.Linear(1, 1)})
    with dk.patched_peft():
        model = peft.get_peft_model(root, dora_config(r=5, lora_alpha=10, target_modules=["up"]))
    dk.patch_peft(model)
    fused = model.base_model.model.up
    with torch.no_grad():
        fused.lora_A["default"].weight.copy_(problem.lora_A)
        fused.lora_B["default"].weight.copy_(problem.lora_B)
        fused.lora_magnitude_vector["default"].weight.copy_(problem.magnitude)
        if layer.bias is not None:
            layer.bias.copy_(problem.bias)
    x = problem.x.clone().requires_grad_()
    y = fused(x)
    leaves = [x, fused.lora_A["default"].weight, fused.lora_B["default"].weight]
    leaves.append(fused.lora_magnitude_vector["default"].weight)
    found = dict(zip(("y", "dx", "dA", "dB", "dm"), (y.detach(), *torch.autograd.grad(y, leaves, problem.grad_y))))
    problem.weight = weight
    expected = exact(problem)
    expected.pop("db", None)
    for name, error in errors(found, expected).items():
        assert error <= ORACLE_FP32, (name, error)


@every_kind
def test_unpatched_it_computes_pefts_formula_on_the_decoded_weight(kind):
    model, base = build(kind)
    trained(model)
    assert type(base.up) is PackedLoraLinear
    x = x_of()
    plain = copy.deepcopy(model)
    for name in ("up", "down"):
        layer = plain.base_model.model.get_submodule(name)
        layer.base_layer, layer.__class__ = decoded_linear(layer.base_layer), peft.tuners.lora.Linear
    dk.patch_peft(model)
    fused = model(x)
    dk.unpatch_peft(model)
    assert torch.equal(model(x), plain(x))
    assert relative_error(fused, plain(x)) <= SAME_FP32


@every_kind
def test_disabled_adapters_leave_the_decoded_base(kind):
    model, base = build(kind)
    trained(model)
    dk.patch_peft(model)
    with model.disable_adapter():
        assert torch.equal(model(x_of()), base.plain(x_of()))


@every_kind
def test_it_is_saved_and_loaded_and_its_base_stays(kind, tmp_path):
    model, base = build(kind)
    dk.patch_peft(model)
    before = {name: tensor.clone() for name, tensor in base.up.base_layer.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        model(x_of()).square().sum().backward()
        optimizer.step()
    y = model(x_of())
    after = base.up.base_layer.state_dict()
    assert before and all(torch.equal(after[name].view(torch.uint8), t.view(torch.uint8)) for name, t in before.items())
    model.save_pretrained(tmp_path)
    again = Base(kind)
    with dk.patched_peft():
        loaded = peft.PeftModel.from_pretrained(again, tmp_path, is_trainable=True)
        assert relative_error(y, base.plain(x_of())) > 1e-4
        assert torch.equal(loaded(x_of()), y)
    # Our own layers read the same file.
    ours = dk.load_adapter(Base(kind), tmp_path)
    assert relative_error(ours(x_of()), y) <= SAME_FP32


def test_another_adapter_is_added_behind_the_scope():
    model, base = build(fp8)
    trained(model)
    dk.patch_peft(model)
    model.add_adapter("other", config(r=2))
    model.set_adapter("other")
    assert relative_error(model(x_of()), base.plain(x_of())) <= TWIN[FP32]
    assert type(base.up.base_layer).__name__ == "FP8Linear"


def test_merging_is_refused_and_merged_weights_stream():
    model, _ = build(fp8)
    trained(model)
    dk.patch_peft(model)
    with pytest.raises(ValueError, match="cannot merge into a FP8Linear"):
        model.merge_and_unload()
    weights = dict(dk.merged_weights(model))
    x = x_of()
    hidden = torch.relu(nn.functional.linear(x, weights["up.weight"], weights["up.bias"]))
    y = nn.functional.linear(hidden, weights["down.weight"], weights["down.bias"])
    assert relative_error(model(x), y) <= SAME_FP32


def test_a_layer_that_cannot_be_read_is_refused_by_name():
    base = Base(fp8)
    del base.down.weight_scale_inv
    with dk.patched_peft(), pytest.raises(ValueError, match=r"down cannot be read: .* no `weight_scale_inv`"):
        peft.get_peft_model(base, config())


def test_plain_lora_is_left_to_peft():
    with dk.patched_peft(), pytest.raises((NotImplementedError, RuntimeError)):
        peft.get_peft_model(Base(fp8), config(use_dora=False)).merge_and_unload()


def test_dropout_keeps_pefts_meaning():
    model, _ = build(fp8, lora_dropout=0.5)
    trained(model)
    unpatched = copy.deepcopy(model)
    dk.patch_peft(model)
    torch.manual_seed(3)
    y = model(x_of())
    torch.manual_seed(3)
    assert relative_error(y, unpatched(x_of())) <= SAME_FP32
