"""MXFP4 and NVFP4 inside the kernels: each against its twin between guard bands, both against the packed values."""

import math

import pytest
import torch
from torch import nn

import dora_kernels as dk
from dora_kernels.ops import kernels, reference
from dora_kernels.ops.base_weights import Fp4Weight, LibraryWeight, needs_its_layer, stored_rounding, weight_of
from dora_kernels.ops.types import Rounding
from tests.support.fp4 import E2M1, KINDS, bytes_of, linear_fp4, parts, values
from tests.support.oracle import errors, exact, make_problem, relative_error, solve
from tests.support.packed import compare
from tests.tolerances import ORACLE_FP32

every_kind = pytest.mark.parametrize("kind", KINDS)
every_operation = pytest.mark.parametrize("ops", [reference, kernels], ids=["reference", "triton"])
# (N, K): whole blocks of a kernel, one and a part, and an odd number of groups.
SHAPES = {"whole": (32, 256), "cut": (37, 160), "narrow": (19, 96), "one_row": (1, 192)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def factors(kind, shape, R):
    problem = make_problem(1, *shape, R, torch.bfloat16, torch.float32)
    return weight_of(linear_fp4(kind, *shape)[0]), problem.lora_A, problem.lora_B, problem.magnitude


@every_kind
@every_shape
@every_operation
def test_decode_is_exact(ops, shape, kind):
    layer, expected = linear_fp4(kind, *shape)
    assert torch.equal(ops.decode(weight_of(layer), torch.float32), expected.float())


@every_operation
@pytest.mark.parametrize("times", [None, False, True], ids=["alone", "over", "times"])
def test_every_code_under_every_scale_of_e4m3(ops, times):
    """NaN and zero among them; the global scale divides or multiplies in fp32."""
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    factor = None if times is None else torch.tensor([0.3 if times else 1234.5])
    codes = torch.arange(16).repeat(256, 1)
    spread = scales.float() if times is None else scales.float() * factor if times else scales.float() / factor
    weight = Fp4Weight(bytes_of(codes), scales, factor, 16, torch.Size((256, 16)), torch.float32, bool(times))
    found = ops.decode(weight, torch.float32)
    assert torch.equal(found.isnan(), spread.isnan().expand(256, 16))
    assert torch.equal(found.nan_to_num(), values(codes, spread, torch.float32).nan_to_num())


@every_operation
def test_every_code_under_every_scale_of_powers_of_two(ops):
    """By Python's own floats: 2⁻¹²⁷ is subnormal; of 255 all but zeros are infinite."""
    codes = torch.arange(16).repeat(256, 2)
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    weight = Fp4Weight(bytes_of(codes), scales, None, 32, torch.Size((256, 32)), torch.float32)
    found = ops.decode(weight, torch.float32)
    numbers = E2M1 + [-number for number in E2M1]
    for byte in range(255):
        expected = torch.tensor([math.ldexp(number, byte - 127) for number in numbers], dtype=torch.float64).float()
        assert torch.equal(found[byte], expected.repeat(2)), byte
    assert torch.equal(found[255, 1:8], torch.full((7,), math.inf))


@every_kind
@every_shape
def test_decode(shape, kind):
    compare("decode", factors(kind, shape, 1)[0], torch.bfloat16)


@every_kind
@every_shape
def test_weight_norm(shape, kind):
    compare("weight_norm", *factors(kind, shape, 7), 2.0)


@every_kind
@every_shape
def test_merge(shape, kind):
    compare("merge", *factors(kind, shape, 24), 2.0, dtype=torch.bfloat16, rounding=Rounding("dithered", 7))


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
@every_kind
def test_output_and_gradients_against_fp64(kind, impl, space):
    layer, matrix = linear_fp4(kind, 37, 96)
    problem = make_problem(9, 37, 96, 5, torch.float32, bias=True)
    problem.weight = weight_of(layer)
    found = solve(problem, impl=impl, space=space)
    problem.weight = matrix
    for name, error in errors(found, exact(problem)).items():
        assert error <= ORACLE_FP32, (name, error)


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
@every_kind
def test_a_fresh_adapter_is_the_product_with_the_decoded_weight(kind, impl, space):
    layer, matrix = linear_fp4(kind, 32, 64)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    adapted = dk.DoraLinear.from_linear(layer, r=4, lora_alpha=8, impl=impl, space=space)
    assert torch.equal(adapted(x), x @ matrix.T)


@every_kind
def test_what_it_answers(kind):
    """Its values are on bf16's grid, into whose gaps small updates would fall."""
    layer, _ = linear_fp4(kind, 8, 64)
    weight = weight_of(layer)
    assert needs_its_layer(layer) and weight.dtype == torch.bfloat16
    assert stored_rounding(weight, "dithered") == "dithered"
    assert stored_rounding(weight._replace(dtype=torch.float32), "dithered") == "nearest"
    assert weight.note == f"{kind.upper()} is decoded in the same pass"


@every_kind
def test_a_model_is_adapted_trained_saved_and_merged(kind, tmp_path):
    layers = [linear_fp4(kind, 64, 32)[0], linear_fp4(kind, 8, 64)[0]]
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
    assert f"{kind.upper()} is decoded in the same pass" in str(dk.explain(model, tokens=3))
    dk.save_adapter(model, tmp_path)
    for layer in (model[0], model[2]):
        layer.reset_adapter()
    assert relative_error(model(x), y) > 0.1
    dk.load_adapter(model, tmp_path)
    assert torch.equal(model(x), y)
    weights = {place: model[place].merged_weight(torch.float32) for place in (0, 2)}
    merged = dk.merge_dora(model, base="dequantized")
    for place, weight in weights.items():
        assert type(merged[place]) is nn.Linear and merged[place].weight.dtype == torch.bfloat16
        # A step of bf16 is at most 2⁻⁷ of a number.
        assert ((merged[place].weight - weight).abs() <= 2**-7 * weight.abs()).all()


def test_nothing_dense_is_kept_for_the_backward():
    layer = dk.DoraLinear.from_linear(linear_fp4("nvfp4", 48, 64)[0], r=4, lora_alpha=8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True))
    assert kept and (48, 64) not in kept


def put(name, tensor):
    def fault(layer):
        delattr(layer, name) if hasattr(layer, name) else None
        setattr(layer, name, tensor if tensor is None else nn.Parameter(tensor, requires_grad=False))

    return fault


def of_scheme(**fields):
    return lambda layer: vars(layer.quantization_scheme).update(fields)


def of_weights(**fields):
    return lambda layer: vars(layer.quantization_scheme.weights).update(fields)


@pytest.mark.parametrize(
    ("kind", "fault", "message"),
    [
        ("nvfp4", of_scheme(format="mxfp6-pack-quantized"), "in the format mxfp6-pack-quantized"),
        ("nvfp4", of_scheme(input_activations="fp4"), "quantises activations"),
        ("mxfp4", of_scheme(output_activations="fp4"), "quantises activations"),
        ("nvfp4", of_weights(num_bits=6), "has float numbers of 6 bits"),
        ("nvfp4", of_weights(symmetric=False), "is asymmetric"),
        ("nvfp4", put("weight_zero_point", torch.zeros(48, 4)), "is FP4 with `weight_zero_point`"),
        ("nvfp4", put("weight_scale", None), "has no `weight_scale`"),
        ("nvfp4", put("weight_global_scale", None), "in torch.float8_e4m3fn without a `weight_global_scale`"),
        ("nvfp4", put("weight_global_scale", torch.ones(1).half()), "`weight_global_scale` in torch.float16"),
        ("nvfp4", put("weight_global_scale", torch.ones(48)), r"has global_scale \[48\]"),
        ("mxfp4", put("weight_global_scale", torch.ones(1)), "in torch.uint8 and a `weight_global_scale`"),
        ("mxfp4", put("weight_scale", torch.ones(48, 2)), "has scales in torch.float32"),
        ("mxfp4", put("weight_scale", torch.ones(48, 4).byte()), "in groups of 16; MXFP4 has 32"),
        ("mxfp4", put("weight_scale", torch.ones(48).byte()), "in groups of 0"),
        ("mxfp4", put("weight_scale", torch.ones(40, 2).byte()), r"has scales \[40, 2\]"),
        ("mxfp4", put("weight_packed", torch.zeros(48, 48).byte()), r"has codes \[48, 48\]"),
        ("mxfp4", put("weight_scale", torch.ones(48, 2, device="meta").byte()), "its scales on meta"),
    ],
)
def test_what_is_half_understood_is_refused(kind, fault, message):
    layer, _ = linear_fp4(kind, 48, 64)
    fault(layer)
    with pytest.raises(ValueError, match=message):
        weight_of(layer)
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=f"cannot be read: .*{message}|on the meta device"):
        dk.apply_dora(model, dk.DoraConfig(r=4))
    assert model[0] is layer


@every_kind
def test_the_library_decodes_the_same_bits(kind):
    compressors = pytest.importorskip("compressed_tensors.compressors.base", reason="compressed-tensors is missing")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    layer, _ = linear_fp4(kind, 64, 128)
    weights = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, group_size=16 if kind == "nvfp4" else 32,
        strategy="tensor_group" if kind == "nvfp4" else "group",
    )  # fmt: skip
    compressor = compressors.BaseCompressor.get_value_from_registry(f"{kind}-pack-quantized")
    tensors = {name: parameter.data for name, parameter in layer.named_parameters()}
    theirs = compressor.decompress(tensors, QuantizationScheme(targets=["Linear"], weights=weights))["weight"]
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(kernels.decode(weight_of(layer), torch.bfloat16), theirs)


def of_torchao(kind, N, K, **changes):
    """A layer with a stand-in for torchao's tensor, and W; a decoder of its own answers 0."""
    codes, scales, factor, spread = parts(kind, N, K)
    name = {"nvfp4": "NVFP4Tensor", "mxfp4": "MXTensor"}[kind]
    weight = type(name, (), {"__module__": "torchao.prototype.mx_formats"})()
    fields = {
        "qdata": bytes_of(codes), "scale": scales if kind == "nvfp4" else scales.view(torch.float8_e8m0fnu),
        "per_tensor_scale": None if factor is None else torch.tensor(0.3), "elem_dtype": torch.float4_e2m1fn_x2,
        "block_size": K // scales.shape[1], "shape": torch.Size((N, K)), "dtype": torch.bfloat16,
        "is_swizzled_scales": False, "device": torch.device("cpu"), "dequantize": lambda: torch.zeros(N, K),
    } | changes  # fmt: skip
    vars(weight).update(fields)
    layer = nn.Linear(K, N, bias=False)
    del layer.weight
    layer.weight = weight
    return layer, values(codes, spread if factor is None else scales.float() * torch.tensor(0.3))


@every_kind
@every_operation
def test_torchaos_plain_tensors_are_decoded(ops, kind):
    layer, matrix = of_torchao(kind, 24, 64)
    assert torch.equal(ops.decode(weight_of(layer), torch.bfloat16), matrix)


@pytest.mark.parametrize(
    "changes", [{"is_swizzled_scales": True}, {"dtype": torch.float16}, {"block_size": 8}], ids=lambda c: next(iter(c))
)
def test_torchaos_other_tensors_are_left_to_it(changes):
    assert isinstance(weight_of(of_torchao("mxfp4", 24, 64, **changes)[0]), LibraryWeight)
