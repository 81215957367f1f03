"""`merge_aware`: the product is with W' as it will be served, the gradient passes straight through the quantiser."""

import pytest
import torch
from torch import nn

import dora_kernels as dk
from bench.day.packed_weights import FORMATS
from dora_kernels.ops import kernels, reference
from dora_kernels.ops.base_weights import LibraryWeight
from dora_kernels.ops.requantize import requantized
from dora_kernels.ops.served import served_norm, served_weight, unquantised
from tests.support.oracle import exact, make_problem, relative_error, solve
from tests.tolerances import ORACLE_FP32, SINGLE_CASE_FACTOR, UNIT_ROUNDOFF

M, N, K, R = 12, 40, 256, 3
FP32, BF16, CPU = torch.float32, torch.bfloat16, torch.device("cpu")
every_format = pytest.mark.parametrize("name", FORMATS)
every_impl = pytest.mark.parametrize("impl", ["reference", "triton"])


def problem_of(name, dtype=FP32, bias=True):
    """A problem over a weight of this format, "dense" for one in bf16; and the fp64 values of W."""
    problem = make_problem(M, N, K, R, dtype, FP32, bias=bias)
    if name == "dense":
        problem.weight = problem.weight.bfloat16()
        values = problem.weight.double()
    else:
        problem.weight, values = FORMATS[name](N, K, CPU)
    product = problem.scaling * problem.lora_B @ problem.lora_A
    problem.lora_B *= 0.3 * values.norm() / product.norm()
    problem.magnitude = (values.norm(dim=1) * (1 + 0.1 * torch.randn(N, generator=torch.manual_seed(1)))).float()
    return problem, values


def quantised(problem, ops=reference, dtype=FP32):
    factors = problem.lora_A, problem.lora_B, problem.magnitude
    return served_weight(ops, problem.weight, *factors, problem.scaling, dtype=dtype)[0]


def straight_through(problem, values, served):
    """In fp64, by autograd: W' + (Q(W') − W'), of which the second term has no gradient."""
    leaves = problem.leaves(torch.Tensor.double)
    x, lora_A, lora_B, magnitude, *bias = leaves
    moved = values + problem.scaling * lora_B @ lora_A
    merged = magnitude[:, None] * moved / moved.detach().norm(dim=1, keepdim=True)
    y = x @ (merged + (served.double() - merged).detach()).T
    y = y + bias[0] if bias else y
    return dict(zip(("y", "dx", "dA", "dB", "dm", "db"), (y, *torch.autograd.grad(y, leaves, problem.grad_y.double()))))


@every_impl
@every_format
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_gradients_are_those_of_a_straight_through_oracle(name, bias, impl):
    problem, values = problem_of(name, bias=bias)
    truth = straight_through(problem, values, quantised(problem))
    found = solve(problem, impl=impl, merge_aware=True)
    for each, expected in truth.items():
        assert relative_error(found[each], expected) <= ORACLE_FP32, each
    # Read off y, dm would be another one, and without the quantiser y.
    product = truth["y"] - (problem.bias.double() if bias else 0)
    read_off = (problem.grad_y.double() * product.detach()).sum(0) / problem.magnitude.double()
    assert relative_error(read_off, truth["dm"]) > 1e-3
    problem.weight = values.float()
    assert relative_error(exact(problem)["y"], truth["y"]) > 1e-3


@every_impl
def test_over_a_dense_base_it_is_rounded_to_nearest(impl):
    problem, values = problem_of("dense", BF16, bias=False)
    served = quantised(problem)
    moved = values + problem.scaling * problem.lora_B.double() @ problem.lora_A.double()
    expected = problem.magnitude.double()[:, None] * moved / moved.norm(dim=1, keepdim=True)
    # Half a unit in the last of bf16's eight bits.
    assert ((served.double() - expected).abs() <= 1.001 * 2**-8 * expected.abs()).all()
    found, truth = solve(problem, impl=impl, merge_aware=True), straight_through(problem, values, served)
    for each, value in truth.items():
        assert relative_error(found[each], value) <= SINGLE_CASE_FACTOR * UNIT_ROUNDOFF[BF16], each
    assert torch.equal(found["y"], problem.x @ served.bfloat16().T)


@every_format
def test_kernels_and_reference_find_the_same_codes(name):
    problem, _ = problem_of(name)
    for dtype in (FP32, BF16):
        assert torch.equal(*(quantised(problem, ops, dtype) for ops in (kernels, reference)))


@every_format
def test_export_quantises_the_same_matrix(name):
    problem, _ = problem_of(name)
    factors = problem.lora_A, problem.lora_B, problem.magnitude
    norms = served_norm(reference, problem.weight, *factors, problem.scaling)
    merged = unquantised(reference, problem.weight, *factors[:2], norms, problem.scaling)
    assert torch.equal(reference.decode(requantized(problem.weight, merged), FP32), quantised(problem))


@every_impl
@every_format
def test_a_fresh_adapter_is_the_product_with_the_base(name, impl):
    """g is 1 to the last bit, and W comes back."""
    problem, _ = problem_of(name)
    problem.lora_B.zero_()
    ops = kernels if impl == "triton" else reference
    problem.magnitude = served_norm(ops, problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, 2.0).norm
    assert torch.equal(quantised(problem, ops), reference.decode(problem.weight, FP32))
    factors = problem.lora_A, problem.lora_B, problem.magnitude
    assert (served_norm(ops, problem.weight, *factors, 2.0).scale == 1).all()


@pytest.mark.parametrize("asked", [("dm",), ("dA",), ("dB",), ("dx",), ("dA", "dm"), ("db",)], ids="-".join)
def test_each_gradient_alone(asked):
    problem, _ = problem_of("NF4")
    full = solve(problem, merge_aware=True)
    names = ("dx", "dA", "dB", "dm", "db")
    leaves = [leaf.requires_grad_(name in asked) for leaf, name in zip(problem.leaves(), names)]
    x, lora_A, lora_B, magnitude, bias = leaves
    y = dk.dora_linear(x, problem.weight, lora_A, lora_B, magnitude, scaling=2.0, bias=bias, merge_aware=True)
    found = torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], problem.grad_y)
    for name, gradient in zip((name for name in names if name in asked), found):
        assert torch.equal(gradient, full[name]), name


def test_nothing_dense_and_no_output_is_kept_for_the_backward():
    problem, _ = problem_of("int4 AWQ")
    kept = []
    x, lora_A, lora_B, magnitude, bias = problem.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        dk.dora_linear(x, problem.weight, lora_A, lora_B, magnitude, scaling=2.0, bias=bias, merge_aware=True)
    assert (M, K) in kept and not {(N, K), (K, N), (M, N)} & set(kept)


@pytest.mark.parametrize("name", ["NF4", "int4 symmetric", "NVFP4", "FP8", "dense"])
def test_a_run_that_diverged_is_seen(name):
    problem, _ = problem_of(name)
    problem.lora_B[3, 1], problem.magnitude[5] = torch.nan, torch.inf
    served = quantised(problem)
    assert not torch.isfinite(served[[3, 5]]).any() and torch.isfinite(served[[0, 4, 6]]).all()


def test_an_output_feature_without_weight_is_zero():
    problem, _ = problem_of("dense")
    problem.weight[7], problem.lora_B[7] = 0, 0
    found = solve(problem, merge_aware=True, autocast=BF16)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert (quantised(problem)[7] == 0).all() and found["dm"][7] == 0


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"space": "token"}, FP32, r'needs weight space: space="token" was asked for'),
        ({"lora_dropout": 0.1, "training": True}, FP32, "needs weight space: dropout"),
        ({}, torch.float16, "needs weight space: in fp16 the gradient of the magnitude underflows"),
    ],
    ids=["token", "dropout", "fp16"],
)
def test_what_needs_token_space_is_refused(options, dtype, message):
    problem, _ = problem_of("FP8", dtype)
    with pytest.raises(ValueError, match=message):
        solve(problem, merge_aware=True, **options)


def test_weights_that_no_export_writes_are_refused():
    problem, values = problem_of("NF4")
    packed = FORMATS["NVFP4"](N, K, CPU)[0]
    library = LibraryWeight("HQQ", torch.Size((N, K)), FP32, CPU, values.float)
    for weight, message in (
        (library, "is read by HQQ alone"),
        (problem.weight._replace(parity=True), "decoded with `nf4_parity`"),
        (packed._replace(is_factor=True), "a tensor of torchao's"),
    ):
        problem.weight = weight
        with pytest.raises(ValueError, match=f"merge_aware quantises .* this weight .*{message}"):
            solve(problem, merge_aware=True)


def test_a_layer_says_what_runs():
    layer = dk.DoraLinear.from_linear(nn.Linear(K, N, dtype=BF16), r=R, lora_alpha=6, merge_aware=True)
    plan = layer.plan(tokens=4)
    assert plan.space == "weight" and "merge_aware quantises the merged weight as it will be served" in plan.reason
    assert "quantises its merged weight" in layer.as_member(BF16)


@pytest.mark.parametrize("name", ["FP8", "int4 AWQ", "dense"])
def test_compiled_it_is_one_graph_and_the_same(name):
    problem, _ = problem_of(name)
    problem.weight = problem.weight.float() if name == "dense" else problem.weight

    def call(x, lora_A, lora_B, magnitude):
        return dk.dora_linear(x, problem.weight, lora_A, lora_B, magnitude, scaling=2.0, merge_aware=True)

    found = []
    torch._dynamo.reset()
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = problem.leaves()[:4]
        y = function(*leaves)
        found.append((y, *torch.autograd.grad(y, leaves, problem.grad_y)))
    assert all(map(torch.equal, *found))
