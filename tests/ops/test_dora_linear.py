"""`dora_linear`: any shape, through the kernels, and errors that say what was expected and what came."""

import pytest
import torch

import dora_kernels as dk
from tests.support.oracle import errors, exact, make_problem, relative_error, solve
from tests.support.sharded import SHARDS
from tests.tolerances import SAME_FP32

SPACES = ["token", "weight"]

SIZES = {  # M, N, K, R
    "N1": (5, 1, 7, 3),
    "K1": (5, 7, 1, 3),
    "M1": (1, 7, 5, 3),
    "r1": (7, 5, 11, 1),
    "r_over_K": (5, 19, 3, 17),
    "primes": (37, 41, 43, 7),
    "over_a_block": (67, 71, 131, 33),
}


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("space", SPACES)
def test_odd_sizes(space, impl, size, bias):
    problem = make_problem(*size, bias=bias)
    solution = solve(problem, space=space, impl=impl)
    for name, error in errors(solution, exact(problem)).items():
        assert error < SAME_FP32, name


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 1, 3), (2, 0), (0,)], ids=str)
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("space", SPACES)
def test_any_number_of_leading_dimensions(space, impl, lead):
    tokens = torch.Size(lead).numel()
    flat = make_problem(tokens, 5, 7, 3, bias=True)
    shaped = make_problem(tokens, 5, 7, 3, bias=True)
    shaped.x, shaped.grad_y = flat.x.reshape(*lead, 7), flat.grad_y.reshape(*lead, 5)
    expected, solution = (solve(p, space=space, impl=impl) for p in (flat, shaped))
    assert solution["y"].shape == (*lead, 5)
    assert solution["dx"].shape == (*lead, 7)
    for name in expected:
        assert torch.equal(solution[name].reshape(expected[name].shape), expected[name]), name
        if not tokens:
            assert not solution[name].any(), f"{name} of no tokens is zero"


def call(problem, **changes):
    tensors = {name: getattr(problem, name) for name in ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")}
    return dk.dora_linear(**{"scaling": 2.0} | tensors | changes)


P = make_problem(4, 5, 7, 3, bias=True)
VALUE_ERRORS = {
    "weight_1d": ({"weight": P.magnitude}, r"weight must be \[out_features, in_features\], got shape \[5\]"),
    "x_width": ({"x": torch.ones(2, 8)}, r"x must be \[\.\.\., in_features\] = \[\.\.\., 7\], got shape \[2, 8\]"),
    "x_scalar": ({"x": torch.ones(())}, r"x must be .* got shape \[\]"),
    "A_transposed": (
        {"lora_A": P.lora_A.T},
        r"lora_A must be \[rank, in_features\] = .*7\], got \[7, 3\]; did you pass lora_A\.T\?",
    ),
    "A_width": ({"lora_A": torch.ones(3, 8)}, r"lora_A must be .*7\], got \[3, 8\]$"),
    "A_1d": ({"lora_A": torch.ones(7)}, r"lora_A must be .* got \[7\]"),
    "A_rank_0": ({"lora_A": torch.ones(0, 7)}, r"lora_A must be .* got \[0, 7\]"),
    "B_transposed": ({"lora_B": P.lora_B.T}, r"lora_B must be \[5, 3\], got \[3, 5\]; did you pass lora_B\.T\?"),
    "B_rank": ({"lora_B": torch.ones(5, 4)}, r"lora_B must be \[5, 3\], got \[5, 4\]$"),
    "magnitude": ({"magnitude": torch.ones(5, 1)}, r"magnitude must be \[5\], got \[5, 1\]"),
    "bias": ({"bias": torch.ones(7)}, r"bias must be \[5\], got \[7\]"),
    "space": ({"space": "compose"}, "space must be .* got 'compose'"),
    "impl": ({"impl": "cuda"}, "impl must be .* got 'cuda'"),
    "rounding": ({"rounding": "up"}, "rounding must be .* got 'up'"),
    "dropout_mode": ({"dropout_mode": "both"}, "dropout_mode must be .* got 'both'"),
    "dropout_1": ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1\.0"),
    "dropout_negative": ({"lora_dropout": -0.1}, r"lora_dropout must be in \[0, 1\), got -0\.1"),
    "A_elsewhere": ({"lora_A": P.lora_A.to("meta")}, "lora_A is on meta but x is on cpu"),
    "weight_elsewhere": ({"weight": P.weight.to("meta")}, "weight is on meta but x is on cpu"),
    "weight_trains": ({"weight": P.weight.clone().requires_grad_()}, r"weight must be frozen.*requires_grad_\(False\)"),
}


@pytest.mark.parametrize(("changes", "message"), VALUE_ERRORS.values(), ids=VALUE_ERRORS)
def test_value_errors_say_what_was_expected_and_what_came(changes, message):
    with pytest.raises(ValueError, match=message):
        call(P, **changes)


TYPE_ERRORS = {
    "mixed": (
        {"x": P.x.bfloat16()},
        r"x torch\.bfloat16 and weight torch\.float32; cast x with x\.to\(torch\.float32\)",
    ),
    "integer_weight": ({"weight": P.weight.to(torch.int8)}, r"weight must be .* got torch\.int8"),
    "integer_x": ({"x": P.x.long()}, r"x must be .* got torch\.int64"),
}


@pytest.mark.parametrize(("changes", "message"), TYPE_ERRORS.values(), ids=TYPE_ERRORS)
def test_type_errors_say_what_was_expected_and_what_came(changes, message):
    with pytest.raises(TypeError, match=message):
        call(P, **changes)


@pytest.mark.parametrize("shard", SHARDS, ids=lambda shard: shard.__name__)
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "magnitude", "bias"])
def test_a_shard_is_never_taken_for_the_whole(name, shard):
    with (
        shard() as of,
        pytest.raises(TypeError, match=rf"{name} is (a DTensor|ZeRO-3's part of \[).*: gather it first"),
    ):
        call(P, **{name: of(getattr(P, name))})


def test_a_gathered_parameter_of_zero_3_is_whole():
    weight = P.weight.clone()
    weight.ds_shape = weight.shape
    assert torch.equal(call(P, weight=weight), call(P))


@pytest.mark.parametrize("space", SPACES)
def test_a_frozen_scale_is_for_inference(space):
    norm_and_scale = (torch.ones(5), torch.full((5,), 3.0))
    with torch.no_grad():
        y = call(P, frozen_scale=norm_and_scale, space=space)
        expected = 3 * (P.x @ (P.weight + 2 * P.lora_B @ P.lora_A).T) + P.bias
    assert relative_error(y, expected) < SAME_FP32, "the given g is used, not m / n"
    with pytest.raises(ValueError, match="frozen_scale is for inference"):
        call(P, frozen_scale=norm_and_scale, lora_A=P.lora_A.clone().requires_grad_())


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("space", SPACES)
def test_a_weight_that_requires_a_gradient_is_welcome_without_autograd(space, impl):
    with torch.no_grad():
        y = call(P, weight=P.weight.clone().requires_grad_(), space=space, impl=impl)
        assert torch.equal(y, call(P, space=space, impl=impl))


@pytest.mark.parametrize("space", ["token", "weight"])
def test_the_meta_device_gives_shapes(space):
    """As `torch.device("meta")` is used to size a model: nothing is computed."""
    layer = dk.DoraLinear.from_linear(torch.nn.Linear(8, 6, device="meta"), r=2, lora_alpha=4, space=space)
    y = layer(torch.empty(2, 3, 8, device="meta"))
    y.sum().backward()
    assert y.is_meta and y.shape == (2, 3, 6)
    assert layer.lora_A.grad.shape == (2, 8) and layer.magnitude.grad.shape == (6,)
