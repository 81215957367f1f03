"""int4 inside the kernels: each against its twin between guard bands, both against the values that were packed."""

import pytest
import torch
from torch import nn

import dora_kernels as dk
from dora_kernels.ops import kernels, reference
from dora_kernels.ops.base_weights import needs_its_layer, stored_rounding, weight_of
from dora_kernels.ops.types import Rounding
from tests.support.int4 import layer_of, linear_awq, linear_compressed, linear_gptq
from tests.support.oracle import errors, exact, make_problem, relative_error, solve
from tests.support.packed import compare
from tests.tolerances import ORACLE_FP32, TWIN


def symmetric(N, K, group, dtype=torch.bfloat16):
    return linear_compressed(N, K, group, dtype)


def asymmetric(N, K, group, dtype=torch.bfloat16):
    return linear_compressed(N, K, group, dtype, symmetric=False)


def act_order(N, K, group, dtype=torch.float16):
    return linear_gptq(N, K, group, dtype, act_order=True)


KINDS = {"symmetric": symmetric, "asymmetric": asymmetric, "gptq": linear_gptq, "awq": linear_awq}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

# (kind, N, K, group): groups as wide as a kernel's block and wider, narrower, of an odd width, and one for each row.
LAYOUTS = {
    "wide": (symmetric, 24, 256, 128),
    "narrow": (asymmetric, 37, 160, 32),
    "odd": (asymmetric, 37, 72, 24),
    "row": (symmetric, 19, 70, None),
    "row_with_zeros": (asymmetric, 19, 70, None),
    "one_row": (asymmetric, 1, 192, 64),
    "gptq": (linear_gptq, 37, 192, 64),
    "gptq_row": (linear_gptq, 19, 70, None),
    "act_order": (act_order, 37, 144, 16),
    "awq": (linear_awq, 40, 256, 128),
    "awq_row": (linear_awq, 8, 72, None),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_operation = pytest.mark.parametrize("ops", [reference, kernels], ids=["reference", "triton"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def factors(layout, R):
    kind, N, K, group = layout
    problem = make_problem(1, N, K, R, torch.bfloat16, torch.float32)
    return weight_of(kind(N, K, group)[0]), problem.lora_A, problem.lora_B, problem.magnitude


@every_layout
@every_operation
def test_decode_is_exact(ops, layout):
    kind, *shape = layout
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer, values = kind(*shape, dtype)
        assert torch.equal(ops.decode(weight_of(layer), torch.float32), values.float())


@every_layout
def test_decode(layout):
    compare("decode", factors(layout, 1)[0], torch.bfloat16)


@every_layout
def test_weight_norm(layout):
    compare("weight_norm", *factors(layout, 7), 2.0)


@every_layout
def test_merge(layout):
    compare("merge", *factors(layout, 24), 2.0, dtype=torch.bfloat16, rounding=Rounding("dithered", 7))


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
@every_kind
def test_output_and_gradients_against_fp64(kind, impl, space):
    layer, values = kind(37, 96, 32, torch.float32)
    problem = make_problem(9, 37, 96, 5, torch.float32, bias=True)
    problem.weight = weight_of(layer)
    found = solve(problem, impl=impl, space=space)
    problem.weight = values
    for name, error in errors(found, exact(problem)).items():
        assert error <= ORACLE_FP32, (name, error)


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
@every_kind
def test_a_fresh_adapter_is_the_product_with_the_decoded_weight(kind, impl, space):
    layer, values = kind(32, 64, 32, torch.bfloat16)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    adapted = dk.DoraLinear.from_linear(layer, r=4, lora_alpha=8, impl=impl, space=space)
    assert torch.equal(adapted(x), x @ values.T)


def test_small_updates_are_kept_where_the_weight_is_on_a_16_bit_grid():
    found = {
        dtype: stored_rounding(weight_of(symmetric(8, 32, 32, dtype)[0]), "dithered")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    assert found == {torch.bfloat16: "dithered", torch.float16: "dithered", torch.float32: "nearest"}


@every_kind
def test_a_model_is_adapted_trained_saved_and_merged(kind, tmp_path):
    layers = [kind(64, 32, 16, torch.float32)[0], kind(8, 64, 32, torch.float32)[0]]
    model = dk.apply_dora(nn.Sequential(layers[0], nn.ReLU(), layers[1]), dk.DoraConfig(r=4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.lora_B, std=0.1)
            layer.magnitude.mul_(1.5)
    x = torch.randn(3, 32)
    before = model(x).detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model(x).square().sum().backward()
    optimizer.step()
    y = model(x).detach()
    assert y.square().sum() < before.square().sum()
    assert "int4 is decoded in the same pass" in str(dk.explain(model, tokens=3))
    dk.save_adapter(model, tmp_path)
    for layer in (model[0], model[2]):
        layer.reset_adapter()
    assert relative_error(model(x), y) > 0.1
    dk.load_adapter(model, tmp_path)
    assert torch.equal(model(x), y)
    merged = dk.merge_dora(model, base="dequantized")
    assert all(type(merged[place]) is nn.Linear for place in (0, 2))
    assert relative_error(merged(x), y) <= TWIN[torch.float32]


def test_nothing_dense_is_kept_for_the_backward():
    layer = dk.DoraLinear.from_linear(symmetric(48, 64, 32)[0], r=4, lora_alpha=8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True))
    assert kept and (48, 64) not in kept


def test_the_library_leaves_an_adapted_layer_packed():
    """Its hook decompresses every layer with a scheme in the model's first forward."""
    model = nn.Sequential(symmetric(8, 32, 32)[0], symmetric(8, 8, None)[0])
    dk.apply_dora(model, dk.DoraConfig(r=2, target_modules=["0"]))
    assert [hasattr(part, "quantization_scheme") for part in (model[0].base_layer, model[1])] == [False, True]


def of_scheme(**fields):
    return lambda layer: vars(layer.quantization_scheme).update(fields)


def of_weights(**fields):
    return lambda layer: vars(layer.quantization_scheme.weights).update(fields)


def put(name, tensor):
    def fault(layer):
        delattr(layer, name) if hasattr(layer, name) else None
        setattr(layer, name, tensor if tensor is None else nn.Parameter(tensor, requires_grad=False))

    return fault


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (of_scheme(format="marlin-24"), "in the format marlin-24"),
        (of_scheme(input_activations="int8"), "quantises activations"),
        (of_weights(num_bits=8), "has int numbers of 8 bits"),
        (of_weights(symmetric=False), "is asymmetric, without `weight_zero_point`"),
        (put("weight_zero_point", torch.zeros(6, 2, dtype=torch.int32)), "is symmetric, with `weight_zero_point`"),
        (put("weight_g_idx", torch.zeros(64, dtype=torch.int32)), "ordered by activations"),
        (put("weight_scale", None), "has no `weight_scale`"),
        (put("weight_scale", torch.ones(1)), r"has scales \[1\]"),
        (put("weight_scale", torch.ones(48, 3)), "groups of 21"),
        (put("weight_shape", torch.tensor((48, 60))), r"has the shape \[48, 60\]"),
        (put("weight_packed", torch.zeros(48, 32, dtype=torch.uint8)), "is packed in torch.uint8"),
        (put("weight_packed", torch.zeros(48, 16, dtype=torch.int32)), r"has codes \[48, 16\]"),
        (put("weight_scale", torch.ones(48, 2, device="meta")), "its scales on meta"),
    ],
)
def test_what_is_half_understood_is_refused(fault, message):
    layer, _ = symmetric(48, 64, 32)
    fault(layer)
    with pytest.raises(ValueError, match=message):
        weight_of(layer)
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=f"cannot be read: .*{message}|on the meta device"):
        dk.apply_dora(model, dk.DoraConfig(r=4))
    assert model[0] is layer


def test_a_forward_of_another_is_refused():
    layer, _ = symmetric(48, 64, 32)
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match="had its forward replaced"):
        dk.apply_dora(nn.Sequential(layer), dk.DoraConfig(r=4))


def test_it_is_read_from_its_layer():
    assert needs_its_layer(symmetric(8, 32, 32)[0])


def test_a_bias_that_is_a_buffer_is_the_layers_own():
    layer, values = linear_gptq(8, 32, 32, torch.float32, bias=True)
    model = dk.apply_dora(nn.Sequential(layer), dk.DoraConfig(r=2))
    x = torch.randn(3, 32)
    expected = torch.nn.functional.linear(x, values, layer.bias)
    assert relative_error(model(x), expected) <= TWIN[torch.float32]
    assert relative_error(dk.merge_dora(model, base="dequantized")(x), expected) <= TWIN[torch.float32]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda layer: setattr(layer, "bits", 8), "has 8 bits"),
        (lambda layer: setattr(layer, "zeros_version", 1), "zeros .* are one too small"),
        (lambda layer: layer.g_idx.fill_(2), "names groups that have no scales"),
        (lambda layer: layer.g_idx.fill_(-1), "names groups that have no scales"),
        (lambda layer: setattr(layer, "g_idx", None), "no `g_idx`"),
        (lambda layer: setattr(layer, "group_size", 48), "groups of 48"),
        (lambda layer: setattr(layer, "qweight", layer.qweight.T), r"has codes \[48, 8\]"),
    ],
)
def test_a_gptq_layer_half_understood_is_refused(fault, message):
    layer, _ = linear_gptq(48, 64, 32)
    fault(layer)
    with pytest.raises(ValueError, match=message):
        dk.apply_dora(nn.Sequential(layer), dk.DoraConfig(r=4))


def test_a_layer_packed_for_one_kernel_is_refused_by_name():
    tensors = linear_gptq(48, 64, 32)[0]._buffers
    with pytest.raises(ValueError, match="a MarlinLinear packs its weight for one kernel"):
        dk.apply_dora(nn.Sequential(layer_of("MarlinLinear", 48, 64, 32, **tensors)), dk.DoraConfig(r=4))
