"""The token-space kernels against their reference twins, between guard bands."""

import pytest
import torch

from dora_kernels.ops import kernels, reference
from dora_kernels.ops.types import NEAREST
from tests.support.oracle import make_problem
from tests.support.twin_problems import ALL_GRADIENTS, ROUNDED, every_dtype, every_shape, norm_scale_of, token_space
from tests.support.twins import compare


@pytest.mark.parametrize("undropped", [False, True], ids=["plain", "peft-dropout"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@every_dtype
@every_shape
def test_rescale_fwd(shape, dtypes, bias, undropped):
    problem = make_problem(*shape, *dtypes, bias=bias)
    arguments = (*token_space(problem), problem.bias, problem.scaling)
    other = torch.randn_like(arguments[0]) if undropped else None
    compare("rescale_fwd", *arguments, undropped=other, in_place=False, **ROUNDED)


@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in-place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_shape
def test_rescale_fwd_of_a_product_that_holds_the_bias(shape, dtype, in_place):
    problem = make_problem(*shape, dtype, bias=True)
    base_out, *rest = token_space(problem)
    own = {"written": (0,) if in_place else (), "in_place": in_place, "base_bias": problem.bias}
    compare("rescale_fwd", base_out + problem.bias, *rest, None, problem.scaling, **own, **ROUNDED)


def test_rescale_fwd_in_place():
    problem = make_problem(37, 29, 53, 7, torch.bfloat16, torch.float32)
    arguments = (*token_space(problem), None, problem.scaling)
    compare("rescale_fwd", *arguments, written=(0,), in_place=True, **ROUNDED)
    base_out = arguments[0].clone()
    assert kernels.rescale_fwd(base_out, *arguments[1:], in_place=True, **ROUNDED).data_ptr() == base_out.data_ptr()


@pytest.mark.parametrize("saved_is", ["output", "base"])
@every_dtype
@every_shape
def test_rescale_bwd(shape, dtypes, saved_is):
    problem = make_problem(*shape, *dtypes)
    base_out, h, lora_B, _ = token_space(problem)
    needs = ALL_GRADIENTS
    arguments = (problem.grad_y, base_out, h, lora_B, norm_scale_of(problem), problem.scaling)
    own = {"magnitude_dtype": dtypes[1], "B_dtype": dtypes[1], "bias_dtype": dtypes[0]}
    compare("rescale_bwd", *arguments, saved_is=saved_is, **needs | own, **ROUNDED)


@pytest.mark.parametrize("needed", ["magnitude_dtype", "B_dtype", "bias_dtype", "needs_base"])
@pytest.mark.parametrize("rank", [7, 40])
@pytest.mark.parametrize("saved_is", ["output", "base"])
def test_rescale_bwd_alone(needed, rank, saved_is):
    """Each gradient without the others; what is not needed is not read."""
    problem = make_problem(37, 29, 53, rank)
    base_out, h, lora_B, _ = token_space(problem)
    needs = dict.fromkeys(ALL_GRADIENTS) | {"needs_base": False, needed: ALL_GRADIENTS[needed]}
    saved = base_out if needed == "magnitude_dtype" else None
    h = h if needed == "B_dtype" or (needed == "magnitude_dtype" and saved_is == "base") else None
    arguments = (problem.grad_y, saved, h, lora_B, norm_scale_of(problem), problem.scaling)
    compare("rescale_bwd", *arguments, saved_is=saved_is, shifts_scale=True, **needs, **ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_shape
def test_rescale_bwd_of_a_product_that_holds_the_bias(shape, dtype):
    problem = make_problem(*shape, dtype, bias=True)
    base_out, h, lora_B, _ = token_space(problem)
    arguments = (problem.grad_y, base_out + problem.bias, h, lora_B, norm_scale_of(problem), problem.scaling)
    own = dict.fromkeys(("magnitude_dtype", "B_dtype", "bias_dtype"), dtype)
    compare("rescale_bwd", *arguments, saved_is="base", base_bias=problem.bias, **ALL_GRADIENTS | own, **ROUNDED)


@pytest.mark.parametrize("has_g", [True, False], ids=["with-g", "without-g"])
@pytest.mark.parametrize("needed", ["magnitude_dtype", "B_dtype", "bias_dtype"])
@pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])
def test_rescale_bwd_casts_B_beside(ops, needed, has_g):
    """To the bits of its own launch, whichever sum it is beside."""
    problem = make_problem(9, 37, 53, 40, torch.bfloat16, torch.float32)
    base_out, h, lora_B, _ = token_space(problem)
    norm_scale, B = norm_scale_of(problem), torch.empty(37, 40, dtype=torch.bfloat16)
    needs = dict.fromkeys(ALL_GRADIENTS) | {"needs_base": False, needed: torch.float32}
    arguments = (problem.grad_y, base_out, h, lora_B, norm_scale, problem.scaling)
    ops.rescale_bwd(*arguments, saved_is="output", B_into=B, B_has_g=has_g, **needs, **ROUNDED)
    scale = norm_scale.scale if has_g else None
    assert torch.equal(B, ops.scaled_cast(lora_B, B.dtype, scale=scale, scaling=problem.scaling, **ROUNDED))


@pytest.mark.parametrize("rank", [7, 40])
def test_rescale_bwd_in_chunks(rank):
    """Enough tokens that several programs share an output feature."""
    problem = make_problem(700, 9, 13, rank, torch.bfloat16, torch.float32)
    base_out, h, lora_B, _ = token_space(problem)
    needs = ALL_GRADIENTS
    arguments = (problem.grad_y, base_out, h, lora_B, norm_scale_of(problem), problem.scaling)
    compare("rescale_bwd", *arguments, saved_is="base", **needs, **ROUNDED)


def test_rescale_bwd_past_two_to_the_31(tmp_path):
    """The second block of tokens begins 2³¹ elements behind the first, in a file with holes."""
    M, N, stride, first = 34, 5, 2**26, 2**31
    file = torch.from_file(str(tmp_path / "dy"), shared=True, size=first + M * stride, dtype=torch.bfloat16)
    problem = make_problem(M, N, 3, 2, torch.bfloat16, torch.float32)
    far = file.as_strided((M, N), (stride, 1), first).copy_(problem.grad_y)
    needs = dict.fromkeys(ALL_GRADIENTS) | {"needs_base": True, "bias_dtype": torch.float32}
    near, far = (
        kernels.rescale_bwd(
            grad_y, None, None, problem.lora_B, norm_scale_of(problem), 1.0, saved_is="output", **needs, **ROUNDED
        )[2:]
        for grad_y in (problem.grad_y, far)
    )
    assert all(torch.equal(*pair) for pair in zip(near, far))


def test_an_fp32_factor_is_not_cut_to_16_bits():
    """z = −1 and h Bᵀ = 1 + 2⁻¹⁰ cancel to what a bf16 B would not hold."""
    ones, lora_B = torch.ones(37, 1, dtype=torch.bfloat16), torch.full((29, 1), 1 + 2.0**-10)
    base_out, scale = -torch.ones(37, 29, dtype=torch.bfloat16), torch.ones(29)
    y = kernels.rescale_fwd(base_out, ones, lora_B, scale, None, 1.0, in_place=False, rounding=NEAREST)
    assert y.eq(2.0**-10).all()
