"""Parity on a real GPU at real sizes: the compiled kernels against fp64, and against the reference on the same GPU."""

import pytest
import torch

import dora_kernels as dk
from tests.support.oracle import NAMES, errors, exact, make_problem, relative_error, solve
from tests.tolerances import SINGLE_CASE, UNIT_ROUNDOFF

pytestmark = pytest.mark.gpu

# Llama-3-8B's seven linears have four shapes: [out_features, in_features].
LAYERS = {"q-o_proj": (4096, 4096), "k-v_proj": (1024, 4096), "gate-up_proj": (14336, 4096), "down_proj": (4096, 14336)}
MIXES = {
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16-fp32": (torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}


ADDRESSABLE = 2**31
"""Elements that a signed 32-bit number can address."""


def _problem(*sizes, **options):
    return make_problem(*sizes, **options, device="cuda")


def _check(problem, space, rounding="nearest"):
    """Our kernels may be no less exact than the reference's PyTorch operations are on the same GPU."""
    truth = exact(problem)
    ours = errors(solve(problem, space=space, impl="triton", rounding=rounding), truth)
    reference = errors(solve(problem, space=space, impl="reference", rounding=rounding), truth)
    unit = UNIT_ROUNDOFF[problem.x.dtype]
    for name, error in ours.items():
        # Same roundings, other summation orders: a tenth more, and a floor where the reference happens to be exact.
        assert error <= 1.1 * reference[name] + 0.1 * unit, (name, error, reference[name])


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("tokens", [1, 512, 8192])
@pytest.mark.parametrize("rank", [8, 16, 64, 384])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_llama_layers_in_bf16(layer, rank, tokens, space):
    _check(_problem(tokens, *layer, rank, torch.bfloat16, torch.float32), space)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("rounding", ["nearest", "dithered"])
@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_dtypes(mix, space, rounding, bias):
    if mix[0] == torch.float16 and space == "weight":
        with pytest.raises(ValueError, match="fp16"):
            solve(_problem(64, 64, 64, 8, *mix), space=space)
        return
    _check(_problem(515, 1024, 4096, 17, *mix, bias=bias), space, rounding)


@pytest.mark.parametrize("space", ["token", "weight"])
def test_three_runs_are_bit_equal(space):
    problem = _problem(2048, 4096, 4096, 16, torch.bfloat16, torch.float32)
    first, second, third = (solve(problem, space=space, impl="triton") for _ in range(3))
    for name in first:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], third[name]), name


def test_more_elements_than_two_to_the_31():
    """M·N = 2.3e9: the last tokens must be theirs, not wrapped around."""
    problem = _problem(64, 28_672, 128, 16, torch.bfloat16, torch.float32)
    tokens = int(1.1 * ADDRESSABLE) // problem.weight.shape[0]
    x = problem.x.repeat(tokens // 64 + 1, 1)[:tokens]
    factors = (problem.weight, problem.lora_A, problem.lora_B, problem.magnitude)
    options = {"scaling": problem.scaling, "space": "token", "impl": "triton", "rounding": "nearest"}
    with torch.no_grad():
        y = dk.dora_linear(x, *factors, **options)
        tail = dk.dora_linear(x[-64:], *factors, **options)
    assert y.numel() > ADDRESSABLE
    # The GEMM of 64 rows may sum in another order than that of 82,000.
    assert relative_error(y[-64:], tail) <= SINGLE_CASE[torch.bfloat16]


@pytest.mark.parametrize("space", ["token", "weight"])
def test_cuda_graph_capture(space):
    """No synchronisation, no host read, no memory from outside the caching allocator: a step can be captured."""
    problem = _problem(512, 1024, 2048, 16, torch.bfloat16, torch.float32)
    leaves = problem.leaves()
    x, lora_A, lora_B, magnitude = leaves

    def step():
        y = dk.dora_linear(
            x, problem.weight, lora_A, lora_B, magnitude, scaling=problem.scaling, space=space, impl="triton"
        )
        return (y, *torch.autograd.grad(y, leaves, problem.grad_y))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        lora_B.mul_(1.5)
    graph.replay()
    for found, expected in zip(captured, step()):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("space", ["token", "weight"])
def test_compiled_by_inductor(space):
    problem = _problem(256, 512, 768, 16, torch.bfloat16, torch.float32)
    leaves = problem.leaves()

    def layer(x, lora_A, lora_B, magnitude):
        return dk.dora_linear(
            x, problem.weight, lora_A, lora_B, magnitude, scaling=problem.scaling, space=space, impl="triton"
        )

    y = torch.compile(layer, fullgraph=True)(*leaves)
    grads = torch.autograd.grad(y, leaves, problem.grad_y)
    expected = solve(problem, space=space, impl="triton")
    for name, error in errors(dict(zip(NAMES, (y, *grads))), expected).items():
        assert error <= SINGLE_CASE[torch.bfloat16], name


def test_peak_memory_of_weight_space():
    """One W' at a time and nothing else of its size: forward and backward of a layer with W of 32 MiB."""
    problem = _problem(64, 4096, 4096, 16, torch.bfloat16, torch.float32)
    weight_bytes = problem.weight.numel() * problem.weight.element_size()
    solve(problem, space="weight", impl="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    solve(problem, space="weight", impl="triton")
    assert torch.cuda.max_memory_allocated() - before < 1.5 * weight_bytes


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_fresh_adapter_is_an_exact_no_op(layer, rank, space):
    """m comes from the norm alone, n in weight space from the merge, which adds up parts: g must still be exactly 1."""
    out_features, in_features = layer
    with torch.device("cuda"):
        linear = torch.nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16)
        x = torch.randn(512, in_features, dtype=torch.bfloat16)
    fresh = dk.DoraLinear.from_linear(linear, r=rank, lora_alpha=2 * rank, space=space, impl="triton")
    with torch.no_grad():
        assert torch.equal(fresh(x), linear(x))
