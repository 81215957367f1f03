"""`dora_conv` against fp64 with W' in full, and against the installed PEFT where no W' exists."""

import copy

import pytest
import torch
from torch import nn

from dora_kernels.layers.conv import geometry_of
from dora_kernels.ops.dora_conv import dora_conv
from tests.support.conv import collect, exact, make_conv, make_problem, peft_model, solve, solve_peft
from tests.support.oracle import errors
from tests.tolerances import ORACLE_FP32, ORACLE_FP64, SINGLE_CASE

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
BARS = {torch.float64: ORACLE_FP64, torch.float32: ORACLE_FP32}
DIMS = pytest.mark.parametrize("dims", [1, 2, 3], ids=["1d", "2d", "3d"])

WITH_A_WEIGHT = {
    "plain": {},
    "without_bias": {"bias": False},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "same": {"padding": "same"},
    "same_on_one_side": {"padding": "same", "kernel": 4},
    "one_by_one": {"kernel": 1},
}
WITHOUT = {
    "groups": {"groups": 2},
    "groups_and_stride": {"groups": 4, "out": 8, "padding": 1, "stride": 2, "bias": False},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": "same", "padding_mode": "reflect"},
}


@DIMS
@pytest.mark.parametrize("settings", WITH_A_WEIGHT.values(), ids=WITH_A_WEIGHT)
@pytest.mark.parametrize("space", ["weight", "token"])
def test_against_fp64(dims, settings, space):
    conv = make_conv(dims, dtype=torch.float64, **settings)
    problem = make_problem(conv)
    found = errors(solve(conv, problem, space=space), exact(conv, problem))
    assert max(found.values()) <= ORACLE_FP64, found


@DIMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_against_fp64(dims, dtype):
    conv = make_conv(dims, channels=3, padding=1, dtype=dtype)
    problem = make_problem(conv, adapter_dtype=torch.float32)
    found = errors(solve(conv, problem, impl="triton", salt=7), exact(conv, problem))
    assert max(found.values()) <= SINGLE_CASE[dtype], found


@DIMS
@pytest.mark.parametrize("settings", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_no_weight_computes_is_pefts(dims, settings, dtype):
    if dims == 3 and settings.get("padding_mode") == "reflect":
        settings = settings | {"padding": 1}  # F.pad reflects whole widths in three dimensions too
    conv = make_conv(dims, dtype=dtype, **settings)
    problem = make_problem(conv)
    found = errors(solve(conv, problem), solve_peft(peft_model(conv, problem), problem))
    assert max(found.values()) <= BARS[dtype], found


@pytest.mark.parametrize("space", ["weight", "token"])
def test_fp16_trains_near_fp64(space):
    conv = make_conv(dtype=torch.float16, padding=1)
    problem = make_problem(conv, adapter_dtype=torch.float32)
    if space == "weight":
        with pytest.raises(ValueError, match="in fp16 the gradient of the magnitude underflows"):
            solve(conv, problem, space=space)
        return
    found = errors(solve(conv, problem), exact(conv, problem))
    assert max(found.values()) <= SINGLE_CASE[torch.float16], found


def test_a_weight_in_channels_last():
    """The layout of most image models: no copy of W is made to see it as a matrix."""
    conv = make_conv(dtype=torch.float64, padding=1)
    problem = make_problem(conv)
    expected = solve(conv, problem, space="weight")
    problem.weight = problem.weight.to(memory_format=torch.channels_last)
    problem.x = problem.x.to(memory_format=torch.channels_last)
    found = errors(solve(conv, problem, space="weight"), expected)
    assert max(found.values()) <= ORACLE_FP64, found


@DIMS
def test_without_a_batch(dims):
    conv = make_conv(dims, dtype=torch.float64)
    problem = make_problem(conv, batch=1)
    expected = solve(conv, problem)
    problem.x, problem.grad_y = problem.x[0], problem.grad_y[0]
    found = solve(conv, problem)
    assert found["y"].ndim == dims + 1 and torch.equal(found["y"], expected["y"][0])
    assert all(torch.equal(found[name], expected[name]) for name in ("dA", "dB", "dm", "db"))


def test_dropout_draws_pefts_mask():
    conv = make_conv(dtype=torch.float64, padding=1)
    problem = make_problem(conv)
    model = peft_model(conv, problem, lora_dropout=0.3).train()
    torch.manual_seed(5)
    expected = solve_peft(model, problem)
    torch.manual_seed(5)
    found = errors(solve(conv, problem, lora_dropout=0.3, dropout_mode="peft", training=True), expected)
    assert max(found.values()) <= ORACLE_FP64, found


def test_dropout_on_the_lora_branch_alone():
    conv = make_conv(dtype=torch.float64)
    problem = make_problem(conv)
    torch.manual_seed(5)
    keep = nn.functional.dropout(torch.ones_like(problem.x), 0.3)
    torch.manual_seed(5)
    found = solve(conv, problem, lora_dropout=0.3, training=True)
    leaves = x, lora_A, lora_B, magnitude, bias = problem.leaves()
    adapted = problem.weight + problem.scaling * torch.einsum("nr,rcij->ncij", lora_B.flatten(1), lora_A)
    scale = (magnitude.flatten() / adapted.detach().flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    low_rank = scale * (adapted - problem.weight)
    y = nn.functional.conv2d(x, scale * problem.weight, bias) + nn.functional.conv2d(keep * x, low_rank)
    assert max(errors(found, collect(y, leaves, problem.grad_y)).values()) <= ORACLE_FP64


def call(conv, problem, **options):
    leaves = problem.leaves()
    options = {"scaling": problem.scaling, "geometry": geometry_of(conv)} | options
    return dora_conv(leaves[0], problem.weight, *leaves[1:4], bias=None, **options), leaves[:4]


@pytest.mark.parametrize("copies", [False, True], ids=["first_step", "later"])
def test_the_model_may_write_over_the_output(copies):
    from dora_kernels.ops.output import OutputUse

    conv = make_conv(dtype=torch.float64, bias=False)
    problem = make_problem(conv)
    y, leaves = call(conv, problem, output_use=OutputUse(is_written=copies))
    found = collect(y.relu_(), leaves, problem.grad_y)
    y, leaves = call(conv, problem)
    assert max(errors(found, collect(y.relu(), leaves, problem.grad_y)).values()) <= ORACLE_FP64


def test_nothing_of_the_weights_size_is_kept():
    conv = make_conv(channels=8, out=16, padding=1)
    problem, kept = make_problem(conv), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        call(conv, problem)
    sizes = {tensor.numel() for tensor in kept if tensor.data_ptr() != problem.weight.data_ptr()}
    assert sizes and problem.weight.numel() not in sizes
    assert any(tensor.data_ptr() == problem.weight.data_ptr() for tensor in kept), "a view, not a copy"


@pytest.mark.parametrize("space", ["weight", "token"])
def test_a_channel_of_zeros_answers_with_its_bias(space):
    conv = make_conv(padding=1)
    problem = make_problem(conv)
    problem.weight[2], problem.lora_B[2] = 0, 0
    found = solve(conv, problem, space=space)
    assert torch.equal(found["y"][:, 2], conv.bias[2].expand_as(found["y"][:, 2]))
    assert all(value.isfinite().all() for value in found.values()) and found["dm"].flatten()[2] == 0


def test_it_differentiates_once():
    conv = make_conv()
    y, leaves = call(conv, make_problem(conv))
    with pytest.raises(RuntimeError, match="cannot differentiate twice"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)


WRONG = {
    "lora_A": (lambda p: setattr(p, "lora_A", p.lora_A[:, :2]), r"lora_A must be \[4, 4, 3, 3\], got \[4, 2, 3, 3\]"),
    "lora_B": (lambda p: setattr(p, "lora_B", p.lora_B[:2]), r"lora_B must be \[6, 4, 1, 1\], got \[2, 4, 1, 1\]"),
    "magnitude": (lambda p: setattr(p, "magnitude", p.magnitude.flatten()), r"must be \[1, 6, 1, 1\], got \[6\]"),
    "x": (lambda p: setattr(p, "x", p.x[:, :2]), r"x must be \[batch, 4, …, …\], or without the batch, got shape"),
    "weight": (lambda p: setattr(p, "weight", p.weight.flatten(1)), r"weight must be \[out_channels, in_channels, "),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_shapes_are_named(change, message):
    conv = make_conv()
    problem = copy.copy(make_problem(conv))
    change(problem)
    with pytest.raises(ValueError, match=message):
        call(conv, problem)


def test_a_rank_that_the_groups_do_not_divide():
    conv = make_conv(groups=2)
    problem = make_problem(conv)
    problem.lora_A = problem.lora_A[:3]
    with pytest.raises(ValueError, match="multiple of the convolution's 2 groups, got 3"):
        call(conv, problem)
