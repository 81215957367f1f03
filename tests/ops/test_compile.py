"""`torch.compile(fullgraph=True)`: one graph, our operator inside; and what autograd can not do, said clearly."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dora_kernels as dk
from tests.support.buffers import count_launches
from tests.support.compile_capture import CALLS, capturing, problem
from tests.support.marks import slow
from tests.support.oracle import make_problem, solve

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own use of it
NAMES = ("x", "lora_A", "lora_B", "magnitude")


def results(call, leaves, grads):
    """Outputs and gradients, and how often each kernel was launched."""
    with count_launches() as launches:
        outputs = call()
        gradients = torch.autograd.grad(outputs, leaves, grads)
    return [*outputs, *gradients], launches


def check_equal(name, eager, compiled):
    for index, (expected, found) in enumerate(zip(eager, compiled)):
        # One sum of siblings' dx has another order: compiled for any size, sizes are not compared.
        exact = not (name.startswith("siblings") and index == 2)
        assert torch.equal(expected, found) if exact else (expected - found).norm() < 0.01 * expected.norm(), index


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_launches_what_runs_eagerly(name):
    """And gives what it gives, to the bit, without copies but that of an output that is kept."""
    call, leaves, grads = CALLS[name]()
    backend, captured = capturing()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    (eager, launches), (found, compiled_launches) = (results(each, leaves, grads) for each in (call, compiled))
    assert len(captured["traced"]) == 1 and compiled_launches == launches
    if "dropout" not in name:
        check_equal(name, eager, found)
    names = captured["forward"] + captured["backward"]
    assert any(name.startswith("ops.") for name in names)
    copies = [name.partition(".")[0] for name in names]
    copies = [name for name in copies if name in ("clone", "copy", "copy_", "_to_copy")]
    # Inductor takes clones out again, unless the output leaves the graph beside what is kept of it.
    clones = {"weight space": 1, "any number of tokens": 1, "siblings, token space": 2, "siblings, weight space": 2}
    # A CPU's GEMM takes two fp32 factors; a GPU's has fp32 sums of 16-bit ones.
    converted = 0 if name.startswith("experts") else 2
    assert sorted(copies) == ["_to_copy"] * converted + ["clone"] * clones.get(name, 0)


@pytest.mark.parametrize(
    "name", [name if name in ("weight space", "experts, gate times up") else slow(name) for name in CALLS]
)
def test_inductor(name, tmp_path, monkeypatch):
    """The default backend writes code of its own around our operator; on a CPU it calls interpreted kernels."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    call, leaves, grads = CALLS[name]()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    (eager, launches), (found, compiled_launches) = (results(each, leaves, grads) for each in (call, compiled))
    assert compiled_launches == launches
    if "dropout" not in name:
        check_equal(name, eager, found)


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("bias", [slow(False), True], ids=["no_bias", "bias"])
def test_the_reference_compiles_to_what_it_computes(space, bias):
    layer, x, grad_y = problem(bias=bias, space=space)
    leaves = [x, layer.lora_A, layer.lora_B, layer.magnitude]
    with torch.no_grad():
        layer.lora_B.normal_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [(y := forward(x), *torch.autograd.grad(y, leaves, grad_y)) for forward in (layer, compiled)]
    for name, eager, ours in zip(("y", *NAMES), *results):
        assert torch.equal(eager, ours), name


def test_the_number_of_tokens_may_change():
    layer, _, _ = problem()
    layer.space = layer.impl = "auto"
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        for tokens in (6, 17, 300):
            x = torch.randn(tokens, layer.in_features, dtype=torch.bfloat16)
            assert torch.equal(compiled(x), layer(x)), tokens


@pytest.mark.parametrize("space", ["token", "weight"])
def test_the_reference_is_compiled_once_for_all_numbers_of_tokens(space):
    layer, _, _ = problem(space=space)
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


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_several_layers_of_any_size(impl, space):
    """A float of a module or of a default argument would be a symbol of the first layer's graph alone."""
    layers = [problem(space=space, R=R)[0] for R in (16, 8)]
    for layer in layers:
        layer.impl = impl
    first, second = layers
    x = torch.randn(6, first.in_features, dtype=torch.bfloat16, requires_grad=True)

    def call(x):
        return second(torch.cat([first(x)] * 2, dim=1)[:, : second.in_features])

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    leaves = [x, first.lora_A, second.magnitude]
    expected, found = ([y := each(x), *torch.autograd.grad(y.sum(), leaves)] for each in (call, compiled))
    assert all(map(torch.equal, expected, found))
