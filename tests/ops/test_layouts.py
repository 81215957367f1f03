"""Every layout of the inputs and of the gradient that comes back computes what the same numbers side by side do."""

import pytest
import torch

from tests.support.buffers import LAYOUTS
from tests.support.oracle import Problem, errors, make_problem, solve
from tests.tolerances import TWIN

SPACES = pytest.mark.parametrize("space", ["token", "weight"])
# In fp16 the magnitude trains in token space alone.
FORMS = [("token", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
FORMS += [("weight", torch.float32), ("weight", torch.bfloat16)]


def check(problem, layouts, impl="triton", **options):
    """Lays out the problem's tensors, {name: layout}; compares with the reference on contiguous copies of the same."""
    laid_out = {name: LAYOUTS[layout](getattr(problem, name)) for name, layout in layouts.items()}
    contiguous = {name: tensor.contiguous() for name, tensor in laid_out.items()}
    solution = solve(Problem(**(vars(problem) | laid_out)), impl=impl, **options)
    expected = solve(Problem(**(vars(problem) | contiguous)), impl="reference", **options)
    for name, error in errors(solution, expected).items():
        assert error < TWIN[problem.x.dtype], name


@pytest.mark.parametrize(("space", "dtype"), FORMS, ids=str)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_input_and_incoming_gradient(x_layout, grad_layout, space, dtype):
    problem = make_problem(11, 13, 17, 3, dtype=dtype, adapter_dtype=torch.float32, bias=space == "token")
    check(problem, {"x": x_layout, "grad_y": grad_layout}, space=space)


@SPACES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "magnitude", "bias"])
def test_parameters(name, layout, space):
    check(make_problem(11, 13, 17, 3, bias=True), {name: layout}, space=space)


@SPACES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_three_dimensions(impl, layout, space):
    problem = make_problem(15, 13, 17, 3)
    problem.x, problem.grad_y = problem.x.view(3, 5, 17), problem.grad_y.view(3, 5, 13)
    check(problem, {"x": layout, "grad_y": layout}, impl, space=space)


def test_the_gradient_of_a_sum():
    """It arrives with every stride 0."""
    results = []
    for grad_y in (torch.ones(11, 13), torch.ones(()).expand(11, 13)):
        problem = make_problem(11, 13, 17, 3)
        problem.grad_y = grad_y
        results.append(solve(problem, space="token", impl="triton"))
    for name, error in errors(*results).items():
        assert error < TWIN[torch.float32], name
