"""FP8 inside the kernels: each against its twin between guard bands, both against transformers' own decoder."""

import peft
import pytest
import torch
from torch import nn

import dora_kernels as dk
from dora_kernels.ops import kernels, reference
from dora_kernels.ops.base_weights import Fp8Weight, needs_its_layer, stored_rounding, weight_of
from dora_kernels.ops.types import Rounding
from tests.support.fp8 import decoded, linear_fp8
from tests.support.oracle import errors, exact, make_problem, relative_error, solve
from tests.support.packed import compare
from tests.tolerances import ORACLE_FP32, TWIN

# (N, K, block): whole and cut blocks, blocks narrower and wider than a kernel's, one scale for all or for each row.
LAYOUTS = {
    "whole": (32, 256, (16, 128)),
    "cut": (37, 300, (16, 128)),
    "narrow": (37, 70, (4, 24)),
    "tensor": (19, 70, None),
    "row": (19, 70, (1, 70)),
    "one_row": (1, 192, (16, 64)),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_operation = pytest.mark.parametrize("ops", [reference, kernels], ids=["reference", "triton"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def factors(layout, R):
    layer = linear_fp8(*layout)
    problem = make_problem(1, *layout[:2], R, torch.bfloat16, torch.float32)
    return weight_of(layer), problem.lora_A, problem.lora_B, problem.magnitude


@every_layout
@every_operation
def test_transformers_reads_the_same(ops, layout):
    for scale_fmt in ("float", "ue8m0"):
        layer = linear_fp8(*layout, scale_fmt=scale_fmt)
        assert torch.equal(ops.decode(weight_of(layer), torch.float32), decoded(layer))


@every_operation
def test_every_code(ops):
    """Subnormal numbers, both zeros and NaN among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    weight = Fp8Weight(codes, torch.full((1, 1), 3.0), (16, 16), torch.bfloat16)
    torch.testing.assert_close(ops.decode(weight, torch.float32), 3 * codes.float(), rtol=0, atol=0, equal_nan=True)


@every_layout
def test_decode(layout):
    weight, *_ = factors(layout, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compare("decode", weight, dtype)


@every_layout
def test_weight_norm(layout):
    weight, *rest = factors(layout, 7)
    compare("weight_norm", weight, *rest, 2.0)


@pytest.mark.parametrize("rank", [1, 24])
@every_layout
def test_merge(layout, rank):
    weight, *rest = factors(layout, rank)
    compare("merge", weight, *rest, 2.0, dtype=torch.bfloat16, rounding=Rounding("dithered", 7))


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_output_and_gradients_against_fp64(impl, space):
    layer = linear_fp8(*LAYOUTS["cut"])
    N, K, _ = LAYOUTS["cut"]
    problem = make_problem(9, N, K, 5, torch.float32, bias=True)
    problem.weight = weight_of(layer)
    found = solve(problem, impl=impl, space=space)
    problem.weight = decoded(layer)
    for name, error in errors(found, exact(problem)).items():
        assert error <= ORACLE_FP32, (name, error)


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_fresh_adapter_is_the_product_with_the_decoded_weight(impl, scale_fmt, space):
    layer = linear_fp8(48, 128, scale_fmt=scale_fmt)
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    adapted = dk.DoraLinear.from_linear(layer, r=4, lora_alpha=8, impl=impl, space=space)
    assert torch.equal(adapted(x), x @ decoded(layer).bfloat16().T)


def test_small_updates_are_kept_where_the_weight_is_on_a_16_bit_grid():
    layers = {scale_fmt: linear_fp8(48, 64, scale_fmt=scale_fmt) for scale_fmt in ("float", "ue8m0")}
    roundings = {name: stored_rounding(weight_of(layer), "dithered") for name, layer in layers.items()}
    assert roundings == {"float": "nearest", "ue8m0": "dithered"}
    assert torch.equal(decoded(layers["ue8m0"]).bfloat16().float(), decoded(layers["ue8m0"]))


def test_a_model_is_adapted_trained_and_merged():
    model = nn.Sequential(linear_fp8(64, 32, bias=True), nn.ReLU(), linear_fp8(8, 64))
    frozen = {name for name, _ in model.named_parameters()}
    model = dk.apply_dora(model, dk.DoraConfig(r=4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.lora_B, std=0.1)
            layer.magnitude.mul_(1.5)
    x = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.sum().backward()
    assert all(getattr(model[0], name).grad.norm() > 0 for name in ("lora_A", "lora_B", "magnitude"))
    still = {name.replace("base_layer.", "") for name, p in model.named_parameters() if not p.requires_grad}
    assert still == frozen
    assert "FP8 is decoded in the same pass; activations are not quantised" in str(dk.explain(model, tokens=3))
    merged = dk.merge_dora(model, base="dequantized")
    assert all(type(merged[place]) is nn.Linear for place in (0, 2))
    # A layer without a bias does not say in which dtype it computes.
    assert (merged[0].weight.dtype, merged[2].weight.dtype) == (torch.float32, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative_error(merged(x), y) <= 4 * TWIN[torch.bfloat16]


def test_nothing_dense_is_kept_for_the_backward():
    layer = dk.DoraLinear.from_linear(linear_fp8(48, 64), r=4, lora_alpha=8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.shape, t.dtype)) or t, lambda t: t):
        layer(torch.randn(5, 64, requires_grad=True))
    assert {dtype for shape, dtype in kept if shape == (48, 64)} <= {torch.float8_e4m3fn}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda layer: delattr(layer, "weight_scale_inv"), "no `weight_scale_inv`"),
        (lambda layer: setattr(layer, "block_size", (8, 8)), "blocks of"),
        (lambda layer: setattr(layer, "weight_scale_inv", nn.Parameter(torch.ones(1, 1))), "has scales"),
        (lambda layer: layer.bfloat16(), "was cast to torch.bfloat16"),
    ],
)
def test_what_is_half_understood_is_refused(fault, message):
    layer = linear_fp8(48, 64)
    fault(layer)
    with pytest.raises(ValueError, match=message):
        weight_of(layer)
    with pytest.raises(ValueError, match=f"cannot be read: .*{message}"):
        dk.apply_dora(nn.Sequential(layer), dk.DoraConfig(r=4))


def test_peft_alone_cannot_build_its_dora_over_it():
    """Which is why `patched_peft` builds it."""
    model = nn.ModuleDict({"linear": linear_fp8(48, 64)})
    with pytest.raises(NotImplementedError, match="not implemented for 'Float8_e4m3fn'"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, use_dora=True, target_modules=["linear"]))


def test_a_subclass_is_no_fp8_layer():
    """It may compute something else with the same weight."""
    layer = linear_fp8(48, 64)
    layer.__class__ = type("FP8GroupedLinear", (type(layer),), {})
    assert not needs_its_layer(layer)
    with pytest.raises(ValueError, match="float8_e4m3fn, of no quantisation known"):
        dk.DoraLinear.from_linear(layer, r=4, lora_alpha=8)
