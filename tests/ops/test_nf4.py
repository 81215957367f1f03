"""NF4 inside the kernels: each against its twin between guard bands, the twin against an independent fp64 reading."""

import pytest
import torch

import dora_kernels as dk
from dora_kernels.ops import reference
from dora_kernels.ops.base_weights import of_params4bit, weight_of
from dora_kernels.ops.types import Rounding
from tests.support.buffers import count_launches
from tests.support.nf4 import decoded, linear_4bit
from tests.support.oracle import Problem, errors, exact, make_problem, relative_error, solve
from tests.support.packed import compare
from tests.tolerances import ORACLE_FP32, TWIN

# (N, K): whole blocks; blocks wider than a row, straddling in even and odd places; one row; splits of K.
SHAPES = {
    "whole": (37, 128),
    "narrow": (40, 64),
    "even": (17, 96),
    "odd": (19, 33),
    "short": (24, 10),
    "one_row": (1, 192),
    "splits": (5, 2112),
}
STATISTICS = {
    "plain": {"nested": False},
    "nested": {"nested": True},
    "wide": {"nested": True, "blocksize": 128},
    "wider": {"nested": False, "blocksize": 256},
    "stored_as_bf16": {"nested": True, "storage": torch.bfloat16},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_statistic = pytest.mark.parametrize("options", STATISTICS.values(), ids=STATISTICS)
every_parity = pytest.mark.parametrize("parity", [False, True], ids=["fp32", "parity"])


def factors(N, K, R, parity=False, dtype=torch.bfloat16, **options):
    problem = make_problem(1, N, K, R, dtype, torch.float32)
    linear = linear_4bit(problem.weight, **options)
    return weight_of(linear, nf4_parity=parity), problem.lora_A, problem.lora_B, problem.magnitude


@every_shape
@every_statistic
def test_the_reference_reads_what_was_packed(options, shape):
    linear = linear_4bit(torch.randn(shape, dtype=torch.bfloat16), **options)
    weight = weight_of(linear)
    truth = decoded(linear.weight)
    assert relative_error(reference.decode(weight, torch.float64), truth) <= ORACLE_FP32
    assert torch.equal(reference.decode(weight, torch.bfloat16), reference.decode(weight, torch.float32).bfloat16())
    # From a row that starts inside a byte too.
    rows = slice(shape[0] // 2, shape[0])
    assert relative_error(reference.base_weight.weight_rows(weight, rows, torch.float64), truth[rows]) <= ORACLE_FP32


@pytest.mark.parametrize("shape", [SHAPES["whole"], SHAPES["odd"]], ids=["whole", "odd"])
def test_the_library_reads_the_same(shape):
    from bitsandbytes.functional import dequantize_4bit

    parameter = linear_4bit(torch.randn(shape, dtype=torch.bfloat16)).weight
    weight = of_params4bit(parameter, parameter.quant_state)
    # Where a row is an odd number of values, bitsandbytes would compile its own PyTorch code first, for 20 seconds.
    with torch.compiler.set_stance("force_eager"):
        theirs = dequantize_4bit(parameter.data, parameter.quant_state)
    assert torch.equal(reference.decode(weight, torch.bfloat16), theirs)


@every_shape
@every_statistic
@every_parity
def test_decode(parity, options, shape):
    weight, *_ = factors(*shape, 1, parity, **options)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compare("decode", weight, dtype)


def test_more_blocks_than_one_nested_block():
    for shape in ((96, 512), (97, 511)):
        weight, *_ = factors(*shape, 1)
        assert weight.nested_absmax.numel() > 2
        compare("decode", weight, torch.float32)


@every_shape
@every_statistic
@every_parity
def test_weight_norm(parity, options, shape):
    weight, *rest = factors(*shape, 7, parity, **options)
    compare("weight_norm", weight, *rest, 2.0)


@pytest.mark.parametrize("rank", [1, 16, 24, 40])
@pytest.mark.parametrize("shape", [SHAPES["whole"], SHAPES["odd"], SHAPES["splits"]], ids=["whole", "odd", "splits"])
@every_parity
def test_merge(parity, shape, rank):
    weight, *rest = factors(*shape, rank, parity)
    with count_launches() as launches:
        compare("merge", weight, *rest, 2.0, dtype=torch.bfloat16, rounding=Rounding("dithered", 7))
    assert launches == {"_weight_norm_kernel": 1, "_merge_scale_kernel": 1}


@pytest.mark.parametrize("impl", ["reference", "triton"])
@every_shape
def test_output_and_gradients_against_fp64(shape, impl):
    N, K = shape
    problem = make_problem(9, N, K, 5, torch.float32, bias=True)
    linear = linear_4bit(problem.weight)
    problem.weight = linear.weight
    found = solve(problem, impl=impl)
    problem.weight = decoded(linear.weight)
    for name, error in errors(found, exact(problem)).items():
        assert error <= ORACLE_FP32, (name, error)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    "options", [{"dropout_mode": "lora"}, {"dropout_mode": "peft"}, {"dtype": torch.float16}], ids=str
)
def test_token_space_where_it_must_be(options, impl):
    """Dropout and fp16 need x Wᵀ apart: W is decoded for it, and for the gradient of x, and not kept."""
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    problem = make_problem(9, 37, 128, 5, dtype, torch.float32)
    dense = Problem(**vars(problem))
    problem.weight = linear_4bit(problem.weight).weight
    dense.weight = decoded(problem.weight).to(dtype)
    if options:
        options |= {"lora_dropout": 0.3, "training": True}
    solutions = []
    for one in (problem, dense):
        torch.manual_seed(3)
        solutions.append(solve(one, impl=impl, space="token", **options))
    for name, error in errors(*solutions).items():
        # The same roundings of the same values but for the norm, which reads fp32 where the dense weight is rounded.
        assert error <= (ORACLE_FP32 if dtype == torch.float32 else TWIN[dtype] * 4), (name, error)


def test_a_fresh_adapter_changes_nothing():
    """Rounded to nearest from fp32, W' is what bitsandbytes itself would decode."""
    linear = linear_4bit(torch.randn(48, 128, dtype=torch.bfloat16) * 0.1, compute_dtype=torch.bfloat16)
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    expected = linear(x)
    for impl in ("reference", "triton"):
        for parity in (False, True):
            layer = dk.DoraLinear.from_linear(linear, r=4, lora_alpha=8, impl=impl, nf4_parity=parity)
            assert torch.equal(layer(x), expected)


def test_a_compute_dtype_of_the_layers_own():
    """As bitsandbytes' layer: computed in its dtype, answered in x's."""
    linear = linear_4bit(torch.randn(48, 128, dtype=torch.bfloat16) * 0.1, compute_dtype=torch.bfloat16)
    layer = dk.DoraLinear.from_linear(linear, r=4, lora_alpha=8)
    x = torch.randn(5, 128)
    assert layer(x).dtype == torch.float32 and torch.equal(layer(x), linear(x))


def test_explain_says_how_the_weight_is_read():
    def reason(**options):
        linear = linear_4bit(torch.randn(48, 64), **options.pop("linear", {}))
        return str(dk.explain(dk.DoraLinear.from_linear(linear, r=4, lora_alpha=8, **options), tokens=8))

    assert "NF4 is decoded in the same pass" in reason()
    assert "rounded first as PEFT does" in reason(nf4_parity=True)
    assert "bitsandbytes (fp4) dequantises the weight at each use" in reason(linear={"quant_type": "fp4"})
    assert reason().startswith("layer (48×64, r=4): weight space: a packed weight is written out once in either form")
