"""compressed-tensors' FP8 layers: one scale for all, for each output feature, or for each block."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dora_kernels as dk
from dora_kernels.ops import kernels, reference
from dora_kernels.ops.base_weights import weight_of
from tests.support.oracle import errors, exact, make_problem, solve
from tests.tolerances import ORACLE_FP32

N, K, BLOCK = 40, 96, (16, 32)
SCALES = {"tensor": (1,), "channel": (N, 1), "block": (3, 3)}
every_strategy = pytest.mark.parametrize("strategy", SCALES)


def linear(strategy, dtype=torch.bfloat16, format_name="float-quantized"):
    """The layer as transformers leaves it after loading, and W in fp64."""
    torch.manual_seed(0)
    layer = nn.Linear(K, N, bias=False, dtype=dtype)
    codes = torch.randn(N, K).to(torch.float8_e4m3fn)
    scales = (0.04 + torch.rand(SCALES[strategy]) / 50).to(dtype)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.weight_scale = nn.Parameter(scales, requires_grad=False)
    layer.quantization_scheme = SimpleNamespace(
        format=format_name,
        weights=SimpleNamespace(type="float", num_bits=8, block_structure=BLOCK if strategy == "block" else None),
        input_activations="dynamic",
    )
    spread = scales.double()
    if strategy == "block":
        spread = spread.repeat_interleave(BLOCK[0], 0)[:N].repeat_interleave(BLOCK[1], 1)[:, :K]
    return layer, codes.double() * spread


@every_strategy
@pytest.mark.parametrize("ops", [reference, kernels], ids=["reference", "triton"])
def test_decode_is_exact(ops, strategy):
    layer, matrix = linear(strategy)
    assert torch.equal(ops.decode(weight_of(layer), torch.float32).double(), matrix)


@every_strategy
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_output_and_gradients_against_fp64(impl, strategy):
    layer, matrix = linear(strategy, torch.float32)
    problem = make_problem(9, N, K, 5, torch.float32)
    problem.weight = weight_of(layer)
    found = solve(problem, impl=impl, space="weight")
    problem.weight = matrix
    for name, error in errors(found, exact(problem)).items():
        assert error <= ORACLE_FP32, (name, error)


@every_strategy
def test_a_model_is_adapted_and_read_again_behind_the_librarys_hook(strategy):
    """Its hook looks for schemes: the adapted layer has none, and is still known."""
    layer, matrix = linear(strategy)
    model = dk.apply_dora(nn.Sequential(layer), dk.DoraConfig(r=4))
    assert not hasattr(layer, "quantization_scheme")
    x = torch.randn(3, K, dtype=torch.bfloat16)
    assert torch.equal(model(x), x @ matrix.T.bfloat16())
    assert "FP8 is decoded in the same pass" in str(dk.explain(model, tokens=3))


def put(name, tensor):
    return lambda layer: setattr(layer, name, nn.Parameter(tensor, requires_grad=False))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (put("weight", torch.zeros(N, K).to(torch.float8_e5m2)), "of its floats of 8 bits e4m3"),
        (put("weight_scale", torch.ones(N, 3)), r"has scales \[40, 3\], which are not known"),
        (put("weight_scale", torch.ones(N, 1, device="meta")), "its scales on meta"),
        (put("weight_zero_point", torch.zeros(N, 1)), "is FP8 with `weight_zero_point`"),
        (
            lambda layer: setattr(layer.quantization_scheme, "format", "mxfp8-quantized"),
            "in the format mxfp8-quantized",
        ),
    ],
)
def test_what_is_half_understood_is_refused(fault, message):
    layer, _ = linear("channel")
    fault(layer)
    with pytest.raises(ValueError, match=message):
        weight_of(layer)
