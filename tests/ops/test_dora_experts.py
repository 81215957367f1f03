"""`dora_experts` against fp64 with each expert's W' materialised, in both implementations; routing's extremes."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from bench.measuring.memory import saved_bytes
from dora_kernels.ops import chunked, dispatch
from dora_kernels.ops.dora_experts import dora_experts
from dora_kernels.ops.kernels import expert_sums
from tests.support.allocations import Allocations, without_the_interpreters
from tests.support.buffers import count_launches
from tests.support.experts import NAMES, exact, make_stack, solve
from tests.support.oracle import errors, relative_error
from tests.tolerances import ORACLE_FP32, ORACLE_FP64, SINGLE_CASE, TWIN

ROUTINGS = {
    "even": (5, 5, 5, 5),
    "all to one": (0, 0, 23, 0),
    "one token": (0, 1, 0, 0),
    "most without": (0, 3, 0, 0, 0, 0, 17, 0, 0),
    "first and last": (9, 0, 0, 4),
    "one expert": (7,),
}
BAR = {torch.float32: ORACLE_FP32, torch.float64: ORACLE_FP64}
IMPLS = ("reference", "triton")
SPACES = ("token", "weight")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("counts", ROUTINGS.values(), ids=ROUTINGS)
def test_every_gradient_is_exact(counts, space, impl):
    stack = make_stack(counts, 19, 21, 3)
    found = errors(solve(stack, space=space, impl=impl), exact(stack))
    assert max(found.values()) <= ORACLE_FP32, found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("space", "dtype"),
    [*product(SPACES, (torch.float64, torch.float32, torch.bfloat16)), ("token", torch.float16)],
    ids=str,
)
def test_types_and_layouts(space, dtype, bias, transposed, impl, device):
    adapter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    stack = make_stack((4, 0, 7, 1), 24, 32, 8, dtype, adapter_dtype, bias, transposed, device)
    found = solve(stack, space=space, impl=impl)
    assert [found[name].dtype for name in NAMES] == [dtype, dtype, *[adapter_dtype] * 3]
    measured = errors(found, exact(stack))
    assert max(measured.values()) <= SINGLE_CASE[dtype], measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("space", "rank"), [("token", 1), ("token", 16), ("token", 24), ("token", 40), ("weight", 24)])
def test_the_kernels_are_the_reference(space, rank, dtype, device, monkeypatch):
    """An expert's tokens in several tiles, the last one not full, in one that is, and in none."""
    monkeypatch.setattr(expert_sums, "TILE", 32)
    stack = make_stack((70, 0, 32, 7), 24, 16, rank, dtype, torch.float32, device=device)
    found = errors(solve(stack, space=space, impl="triton"), solve(stack, space=space, impl="reference"))
    assert max(found.values()) <= TWIN[dtype], found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("space", SPACES)
def test_an_expert_without_tokens_trains_nothing(space, impl):
    stack = make_stack((4, 0, 3), 20, 24, 2, bias=True)
    stack.weight[1] = stack.lora_A[1] = torch.nan
    found = solve(stack, space=space, impl=impl)
    for name in ("dA", "dB", "dm"):
        assert not found[name][1].any() and found[name].isfinite().all()
        assert all(found[name][expert].any() for expert in (0, 2))


@pytest.mark.parametrize("impl", IMPLS)
def test_norms_are_of_the_experts_that_have_tokens(impl):
    stack = make_stack((4, 0, 3), 20, 24, 2)
    adapted = stack.weight.double() + stack.scaling * stack.lora_B.double() @ stack.lora_A.double()
    factors = stack.lora_A, stack.lora_B, stack.magnitude, stack.scaling
    with dispatch.operations_for(stack.weight, impl) as (ops, weight):
        every, some = ops.expert_norm(weight, *factors), ops.expert_norm(weight, *factors, ends=stack.ends)
    assert relative_error(every.norm, adapted.norm(dim=2)) <= ORACLE_FP32
    assert relative_error(every.scale, stack.magnitude / adapted.norm(dim=2)) <= ORACLE_FP32
    for part, whole in zip(some, every):
        assert not part[1].any() and torch.equal(part[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("space", SPACES)
def test_the_norms_of_all_experts_are_one_launch(space):
    stack = make_stack((4, 0, 3, 9, 1), 20, 24, 2)
    with count_launches() as run:
        solve(stack, space=space, impl="triton")
    assert run["_expert_norm_kernel"] == 1 and not run["_weight_norm_kernel"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("space", SPACES)
def test_no_token_at_all(space, impl):
    stack = make_stack((0, 0), 20, 24, 2)
    found = solve(stack, space=space, impl=impl)
    assert found["y"].shape == (0, 20) and found["dx"].shape == (0, 24)
    assert not any(found[name].any() for name in ("dA", "dB", "dm"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("space", SPACES)
def test_zero_rows_are_their_bias_and_magnitude_zero_trains(space, impl):
    stack = make_stack((4, 3), 20, 24, 2, bias=True)
    stack.weight[0, 5] = stack.lora_B[0, 5] = 0
    stack.magnitude[1, 7] = 0
    found, truth = solve(stack, space=space, impl=impl), exact(stack)
    assert torch.equal(found["y"][:4, 5], stack.bias[0, 5].expand(4))
    assert found["dm"][0, 5] == 0 and not found["dB"][0, 5].any()
    assert (found["dm"][1, 7] - truth["dm"][1, 7]).abs() <= 1e-4 * truth["dm"][1].abs().max()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("frozen", range(4), ids=NAMES[1:])
def test_only_what_is_asked_for_is_computed(frozen, space, impl):
    stack = make_stack((4, 0, 3), 20, 24, 2)
    leaves, truth = stack.leaves(), exact(stack)
    leaves[frozen].requires_grad_(False)
    options = {"scaling": 2.0, "space": space, "impl": impl}
    dora_experts(leaves[0], stack.weight, *leaves[1:], stack.ends, **options).backward(stack.grad_y)
    assert leaves[frozen].grad is None
    found = {name: leaf.grad for name, leaf in zip(NAMES[1:], leaves) if leaf.requires_grad}
    assert max(errors(found, {name: truth[name] for name in found}).values()) <= ORACLE_FP32


ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("counts", ROUTINGS.values(), ids=ROUTINGS)
def test_gate_times_up_is_exact(counts, space, impl):
    for name, function in ACTIVATIONS.items():
        stack = make_stack(counts, 18, 21, 3)
        found = errors(solve(stack, space=space, impl=impl, activation=name), exact(stack, function))
        assert max(found.values()) <= ORACLE_FP32, (name, found)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_types_of_gate_times_up(dtype, bias, impl, device):
    """With a bias each step is a pass of its own."""
    adapter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    stack = make_stack((4, 0, 7, 1), 32, 24, 8, dtype, adapter_dtype, bias, device=device)
    found = solve(stack, space="token", impl=impl, activation="silu")
    assert [found[name].dtype for name in NAMES] == [dtype, dtype, *[adapter_dtype] * 3]
    measured = errors(found, exact(stack, F.silu))
    assert max(measured.values()) <= SINGLE_CASE[dtype], measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rank", "features"), [(1, 30), (16, 64), (24, 140), (40, 32)])
def test_the_kernels_of_gate_times_up_are_the_reference(rank, features, dtype, device):
    """Several tiles of an expert, the last one not full, and several blocks of features."""
    stack = make_stack((70, 0, 32, 7), features, 16, rank, dtype, torch.float32, device=device)
    options = {"space": "token", "activation": "gelu_tanh"}
    found = errors(solve(stack, impl="triton", **options), solve(stack, impl="reference", **options))
    assert max(found.values()) <= TWIN[dtype], found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", [(0, 1), (0, 2, 3), (1, 2, 3), (0, 1, 2)], ids=["B, m", "A", "x", "m"])
def test_gate_times_up_with_some_of_the_gradients(frozen, impl):
    stack = make_stack((4, 0, 3), 20, 24, 2)
    leaves, truth = stack.leaves(), exact(stack, F.silu)
    for index in frozen:
        leaves[index].requires_grad_(False)
    options = {"scaling": 2.0, "space": "token", "impl": impl, "activation": "silu"}
    a = dora_experts(leaves[0], stack.weight, *leaves[1:], stack.ends, **options)
    a.backward(stack.grad_y[:, :10])
    found = {name: leaf.grad for name, leaf in zip(NAMES[1:], leaves) if leaf.requires_grad}
    assert len(found) == 4 - len(frozen)
    assert max(errors(found, {name: truth[name] for name in found}).values()) <= ORACLE_FP32


@pytest.mark.parametrize("impl", IMPLS)
def test_one_pass_keeps_the_product_alone(impl):
    """Beyond inputs of the call: z and h. In passes of their own y, silu(gate) and h; a is the next layer's."""
    stack = make_stack((9, 0, 7), 32, 24, 2)
    leaves, kept = stack.leaves(), []
    for activation in ("silu", None):
        options = {"scaling": 2.0, "space": "token", "impl": impl, "activation": activation}
        given = [*leaves, stack.weight]

        def call(options=options):
            y = dora_experts(leaves[0], stack.weight, *leaves[1:], stack.ends, **options)
            return y if options["activation"] else F.silu(y[:, :16]) * y[:, 16:]

        kept.append(saved_bytes(call, given))
    wide = 4 * 16 * 16  # of [tokens, intermediate]
    assert kept[1] - kept[0] == wide


def test_a_stack_that_would_train_and_what_does_not_fit_is_refused():
    stack = make_stack((4, 3), 20, 24, 2)
    x, *factors = stack.leaves()
    with pytest.raises(ValueError, match=r"lora_B must be \[2, 20, 2\], got \[2, 2, 20\]"):
        dora_experts(x, stack.weight, factors[0], factors[1].mT, factors[2], stack.ends, scaling=2.0)
    with pytest.raises(TypeError, match="ends must be int32"):
        dora_experts(x, stack.weight, *factors, stack.ends.long(), scaling=2.0)
    with pytest.raises(TypeError, match="one dtype"):
        dora_experts(x.double(), stack.weight, *factors, stack.ends, scaling=2.0)
    with pytest.raises(ValueError, match=r"activation must be one of silu, gelu_tanh.*got 'relu' of 20"):
        dora_experts(x, stack.weight, *factors, stack.ends, scaling=2.0, activation="relu")
    with pytest.raises(ValueError, match="weight must be frozen"):
        dora_experts(x, stack.weight.requires_grad_(), *factors, stack.ends, scaling=2.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("space", SPACES)
def test_nothing_of_the_stacks_size_is_made(space, bias, impl, monkeypatch):
    """The largest fresh tensor is smaller than one expert's weight. In weight space W' of one expert is made each way,
    whatever the number of experts that have tokens."""
    E, N, K, R = 8, 48, 64, 2
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 4 * K)
    without_the_interpreters(monkeypatch)
    stack = make_stack((3, 0, 5, 1, 0, 0, 2, 1), N, K, R, torch.bfloat16, torch.float32, bias)
    leaves, ends = stack.leaves(), stack.ends
    with Allocations() as made:
        options = {"scaling": 2.0, "bias": stack.bias, "space": space, "impl": impl}
        y = dora_experts(leaves[0], stack.weight, *leaves[1:], ends, **options)
        torch.autograd.grad(y, leaves, stack.grad_y)
    sizes = sorted(torch.Size(shape).numel() for shape, _ in made.made.elements())
    if space == "weight":
        assert sizes[-2:] == [N * K] * 2
        del sizes[-2:]
    assert E * K * R <= sizes[-1] < N * K
    with Allocations() as made:
        stack.weight.float()
    assert max(torch.Size(shape).numel() for shape, _ in made.made) == E * N * K
