"""`torch.compile(fullgraph=True)`: one graph, the Triton kernels inside; and what autograd can not do, said clearly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dora_kernels as dk
from dora_kernels.ops.dora_siblings import dora_siblings
from tests.support.buffers import count_launches
from tests.support.compile_capture import (
    CASES,
    EXPERTS,
    SIBLINGS,
    call_experts,
    experts,
    factors_of,
    problem,
    siblings,
)
from tests.support.marks import slow
from tests.support.oracle import make_problem, solve

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own use of it
NAMES = ("x", "lora_A", "lora_B", "magnitude")


@pytest.fixture(scope="module")
def captured():
    """Per case, what `tests.support.compile_capture` prints: another process, whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_capture"],
        cwd=Path(__file__).parents[2],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return {row.pop("case"): row for row in map(json.loads, finished.stdout.splitlines())}


def kernels_in(names):
    return sorted(name for name in names if name.endswith("_kernel"))


@pytest.mark.parametrize("case", CASES)
def test_one_graph_holds_the_kernels_that_run_eagerly(case, captured):
    options = {name: value for name, value in CASES[case].items() if name != "dynamic"}
    layer, x, grad_y = problem(torch.randn, **options)
    layer.impl = "triton"
    with count_launches() as forward:
        y = layer(x)
    with count_launches() as backward:
        torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B, layer.magnitude], grad_y)
    compiled = captured[case]
    assert len(compiled["traced"]) == 1
    assert kernels_in(compiled["forward"]) == sorted(forward.elements())
    assert kernels_in(compiled["backward"]) == sorted(backward.elements())


@pytest.mark.parametrize("case", EXPERTS)
def test_one_graph_holds_the_kernels_of_experts(case, captured):
    weight, (x, *factors), grad_y, ends = experts(torch.randn)
    with count_launches() as forward:
        y = call_experts(x, weight, *factors, ends, EXPERTS[case])
    with count_launches() as backward:
        torch.autograd.grad(y, (x, *factors), grad_y[:, : y.shape[1]])
    compiled = captured[case]
    assert len(compiled["traced"]) == 1
    assert kernels_in(compiled["forward"]) == sorted(forward.elements())
    assert kernels_in(compiled["backward"]) == sorted(backward.elements())


@pytest.mark.parametrize("case", SIBLINGS)
def test_one_graph_holds_the_kernels_of_several_layers(case, captured):
    """With one launch for all norms, and one for all W', which write over none of their inputs."""
    x, members, grads = siblings(torch.randn)
    with count_launches() as forward:
        outputs = dora_siblings(x, members, space=SIBLINGS[case], impl="triton")
    with count_launches() as backward:
        torch.autograd.grad(outputs, (x, *factors_of(members)), grads)
    compiled = captured[case]
    assert len(compiled["traced"]) == 1
    assert kernels_in(compiled["forward"]) == sorted(forward.elements())
    assert kernels_in(compiled["backward"]) == sorted(backward.elements())
    assert not {"copy_", "copy"} & {name.partition(".")[0] for name in compiled["forward"] + compiled["backward"]}


@pytest.mark.parametrize("case", CASES)
def test_compiling_adds_no_copies_but_that_of_an_output_that_is_kept(case, captured):
    names = captured[case]["forward"] + captured[case]["backward"]
    copies = [name.partition(".")[0] for name in names]
    copies = [name for name in copies if name in ("clone", "copy", "copy_", "_to_copy")]
    # Inductor takes that one out again, unless the output leaves the graph beside what is kept of it.
    assert copies == ([] if "bias" in case or "dropout" in case else ["clone"])


def test_compiled_kernels_do_not_run_on_a_cpu(captured):
    assert captured["reason_without_gpu"]["reason"] == "reference: the tensors are on cpu"


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("bias", [slow(False), True], ids=["no_bias", "bias"])
def test_the_reference_compiles_to_what_it_computes(space, bias):
    layer, x, grad_y = problem(torch.randn, bias=bias, space=space)
    leaves = [x, layer.lora_A, layer.lora_B, layer.magnitude]
    with torch.no_grad():
        layer.lora_B.normal_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [(y := forward(x), *torch.autograd.grad(y, leaves, grad_y)) for forward in (layer, compiled)]
    for name, eager, ours in zip(("y", *NAMES), *results):
        assert torch.equal(eager, ours), name


def test_the_number_of_tokens_may_change():
    layer, _, _ = problem(torch.randn)
    layer.space = layer.impl = "auto"
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        for tokens in (6, 17, 300):
            x = torch.randn(tokens, layer.in_features, dtype=torch.bfloat16)
            assert torch.equal(compiled(x), layer(x)), tokens


@pytest.mark.parametrize("space", ["token", "weight"])
def test_the_reference_is_compiled_once_for_all_numbers_of_tokens(space):
    layer, _, _ = problem(torch.randn, space=space)
    torch._dynamo.reset()
    compiled = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(layer, fullgraph=True, backend=compiled)
    for tokens in (6, 17, 30, 41):
        x = torch.randn(tokens, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        gradients = [torch.autograd.grad(call(x).sum(), [x, layer.magnitude]) for call in (layer, forward)]
        assert all(map(torch.equal, *gradients)), tokens
    assert compiled.frame_count == 2, "the first number of tokens is taken for a constant, the second for a symbol"


@pytest.mark.parametrize("space", ["token", "weight"])
def test_double_backward_is_refused(space):
    p = make_problem(5, 6, 7, 3)
    x = p.x.clone().requires_grad_()
    y = dk.dora_linear(
        x, p.weight, p.lora_A.requires_grad_(), p.lora_B, p.magnitude, scaling=2.0, space=space, impl="triton"
    )
    # A constant grad_y is how a gradient penalty arrives: it must not be dropped in silence.
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(y, x, p.grad_y, create_graph=True)[0].sum().backward()


def _loss(x, problem):
    return dk.dora_linear(x, problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, scaling=2.0).sum()


TRANSFORMS = {
    "grad": lambda p: torch.func.grad(lambda x: _loss(x, p))(p.x),
    "vmap": lambda p: torch.func.vmap(lambda x: _loss(x, p))(p.x),
    "jvp": lambda p: torch.func.jvp(lambda x: _loss(x, p), (p.x,), (p.x,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_function_transforms_are_refused(transform):
    p = make_problem(5, 6, 7, 3)
    with pytest.raises(RuntimeError, match=r"autograd\.Function"):
        transform(p)
    assert solve(p)["y"].isfinite().all(), "a refused transform leaves nothing behind"
