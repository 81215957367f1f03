"""Layers of one input as one function: against the fp64 oracle, the layers one by one, and the base model."""

import pytest
import torch
import torch.nn.functional as F

from dora_kernels.ops import dispatch
from dora_kernels.ops.dora_siblings import dora_siblings, plan_siblings
from dora_kernels.ops.members import Member, feature_slices
from dora_kernels.ops.merged_members import merged
from dora_kernels.ops.types import NEAREST
from tests.support.buffers import count_launches
from tests.support.mlp import make_member
from tests.support.oracle import relative_error
from tests.support.siblings import SIZES, exact, make_siblings, one_by_one, solve, solved, worst
from tests.tolerances import ORACLE_FP64, TWIN

every_space = pytest.mark.parametrize("space", ["token", "weight"])
every_impl = pytest.mark.parametrize("impl", ["reference", "triton"])


@every_space
@every_impl
@pytest.mark.parametrize("biases", ["", "qkv", "v"], ids=["no-bias", "biases", "one-bias"])
def test_gradients_in_fp64(biases, impl, space):
    problem = make_siblings(13, 11, torch.float64, biases=biases)
    assert worst(solve(*problem, space=space, impl=impl), exact(*problem)) <= ORACLE_FP64


@pytest.mark.parametrize("biases", ["", "k"], ids=["no-bias", "one-bias"])
@pytest.mark.parametrize(
    ("dtype", "space"),
    [
        (torch.float32, "token"),
        (torch.float32, "weight"),
        (torch.bfloat16, "token"),
        (torch.bfloat16, "weight"),
        (torch.float16, "token"),
    ],
    ids=str,
)
def test_the_kernels_are_their_twins(dtype, biases, space):
    problem = make_siblings(37, 24, dtype, torch.float32, biases)
    found, expected = (solve(*problem, space=space, impl=impl) for impl in ("triton", "reference"))
    assert worst(found, expected) <= 2 * TWIN[dtype]  # two kernels in a row


@pytest.mark.parametrize("biases", ["", "qkv"], ids=["no-bias", "biases"])
@pytest.mark.parametrize(
    ("dtype", "space"), [(torch.bfloat16, "token"), (torch.bfloat16, "weight"), (torch.float16, "token")], ids=str
)
def test_errors_in_16_bits_are_those_of_the_layers_at_most(dtype, space, biases):
    """The mean over four seeds."""
    together, alone = {}, {}
    sizes = {"q": (192, 16), "k": (64, 16), "v": (64, 8)}
    for seed in range(4):
        problem = make_siblings(256, 128, dtype, torch.float32, biases, seed, sizes)
        expected = exact(*problem)
        for sums, found in ((together, solve(*problem, space=space)), (alone, one_by_one(*problem, space=space))):
            for name in expected:
                sums[name] = sums.get(name, 0.0) + relative_error(found[name], expected[name]) / 4
    assert {name: together[name] / alone[name] for name in alone if together[name] > 1.05 * alone[name]} == {}


def test_young_adapters_in_fp16_in_which_g_B_would_underflow():
    x, grads, members = make_siblings(64, 32, torch.float16, torch.float32)
    for member in members.values():
        member.lora_B.data.mul_(1e-6)
        member.magnitude.data.mul_(0.1)
    found, alone, expected = solve(x, grads, members), one_by_one(x, grads, members), exact(x, grads, members)
    for name in (f"{name}.lora_A" for name in members):
        assert relative_error(found[name], expected[name]) <= 1.05 * relative_error(alone[name], expected[name])


def test_fp16_takes_token_space():
    """In which the gradient of the magnitude does not underflow."""
    problem = make_siblings(8, 16, torch.float16, torch.float32)
    with pytest.raises(ValueError, match="underflows"):
        solve(*problem, space="weight")
    assert (
        plan_siblings(list(problem[2].values()), tokens=8, dtype=torch.float16, space="auto", impl="auto").space
        == "token"
    )


@every_impl
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_merged_buffer_holds_the_bits_of_each_layers_merge(dtype, impl):
    _, _, members = make_siblings(2, 24, dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    members, ops = list(members.values()), dispatch.implementation(impl)
    weight, norm_scale = merged(ops, members, dtype)
    again, _ = merged(ops, members, dtype, norm_scale)
    assert torch.equal(weight, again)
    for member, rows in zip(members, feature_slices(members)):
        own, own_norm_scale = ops.merge(
            member.weight, *member.factors, member.scaling, dtype=dtype, rounding=member.rounding
        )
        assert torch.equal(weight[rows], own)
        assert all(torch.equal(part[rows], each) for part, each in zip(norm_scale, own_norm_scale))


def _fresh(member, impl):
    """As `reset_adapter` leaves a layer."""
    lora_B = torch.zeros_like(member.lora_B, requires_grad=True)
    with dispatch.operations_for(member.weight, impl) as (ops, weight):
        (norm, _), _ = ops.weight_norm(weight, member.lora_A, lora_B, member.magnitude, member.scaling)
    return member._replace(lora_B=lora_B, magnitude=norm.requires_grad_())


# In 16 bits a layer adds its bias after the product was rounded, the base in the product.
@every_impl
@pytest.mark.parametrize(
    ("dtype", "biases"), [(torch.float32, ""), (torch.float32, "qv"), (torch.bfloat16, "")], ids=str
)
def test_a_fresh_adapter_leaves_the_models_bits(dtype, biases, impl):
    """In token space those of the base's layers; in weight space those of the base's stacked weight."""
    x, _, members = make_siblings(24, 64, dtype, torch.float32, biases)
    members = [_fresh(member, impl) for member in members.values()]
    expected = [F.linear(x, member.weight, member.bias) for member in members]
    found = dora_siblings(x, members, space="token", impl=impl)
    assert all(map(torch.equal, found, expected))
    stack = x @ torch.cat([member.weight for member in members]).T
    found = dora_siblings(x, members, space="weight", impl=impl)
    for y, member, rows in zip(found, members, feature_slices(members)):
        assert torch.equal(y, stack[:, rows] if member.bias is None else stack[:, rows] + member.bias)


@every_space
@pytest.mark.parametrize("biases", ["", "qkv", "k"], ids=["no-bias", "biases", "one-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_outputs_are_those_of_the_layers(dtype, biases, space):
    """The product with a stacked A or W' may be summed in another order: which, the CPU decides."""
    problem = make_siblings(24, 64, dtype, torch.float32, biases)
    found, alone = solve(*problem, space=space), one_by_one(*problem, space=space)
    for name in SIZES:
        assert relative_error(found[name], alone[name]) <= TWIN[dtype]


IN_FORWARD = {
    "token": {"_weight_norm_kernel": 3, "_rescale_fwd_kernel": 3},
    "weight": {"_weight_norm_kernel": 3, "_merge_scale_kernel": 3},
}
BACKWARD = {"_rescale_bwd_kernel": 3, "_rescale_bwd_finish_kernel": 3}
IN_BACKWARD = {"token": BACKWARD, "weight": BACKWARD | {"_merge_scale_kernel": 3}}
IN_ONE = {"_weight_norm_kernel": "_stacked_norm_kernel", "_merge_scale_kernel": "_stacked_merge_kernel"}


@pytest.mark.parametrize("alike", [False, True], ids=["several-ranks", "one-rank"])
@every_space
def test_launches(space, alike):
    """Adapters of one rank and one scaling have one launch for all norms, and one for all W'."""
    sizes = {"q": (24, 5), "k": (10, 5), "v": (13, 5)} if alike else SIZES
    x, grads, members = make_siblings(24, 32, torch.bfloat16, torch.float32, sizes=sizes)
    if alike:
        members = {name: member._replace(scaling=0.5) for name, member in members.items()}
    with count_launches() as forward:
        outputs = dora_siblings(x, list(members.values()), space=space, impl="triton")
    with count_launches() as backward:
        solved(outputs, x, grads, members)
    for found, expected in ((forward, IN_FORWARD[space]), (backward, IN_BACKWARD[space])):
        if alike:
            expected = {IN_ONE.get(name, name): 1 if name in IN_ONE else count for name, count in expected.items()}
        assert found == expected


@every_space
def test_several_scalings_are_several_launches(space):
    """Of one rank, too."""
    problem = make_siblings(8, 16, torch.float64, sizes={"q": (12, 5), "k": (10, 5)})
    assert worst(solve(*problem, space=space, impl="triton"), exact(*problem)) <= ORACLE_FP64


@every_space
@every_impl
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_layers_in_one_launch_are_those_of_several(dtype, impl, space, monkeypatch):
    """Bit for bit."""
    sizes = {"q": (24, 5), "k": (10, 5), "v": (13, 5)}
    x, grads, members = make_siblings(24, 32, dtype, torch.promote_types(dtype, torch.float32), sizes=sizes)
    members = {name: member._replace(scaling=0.5) for name, member in members.items()}
    together = solve(x, grads, members, space=space, impl=impl)
    monkeypatch.setattr("dora_kernels.ops.merged_members.in_one_launch", lambda members: False)
    alone = solve(x, grads, members, space=space, impl=impl)
    assert [name for name in alone if not torch.equal(together[name], alone[name])] == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k: [q, k._replace(lora_A=k.lora_A.detach())], "a factor does not train"),
        (lambda q, k: [q, k._replace(bias=torch.zeros(10, requires_grad=True))], "a bias trains"),
        (lambda q, k: [q._replace(weight=q.weight.clone().requires_grad_()), k], "a weight trains"),
        (lambda q, k: [q, k._replace(weight=k.weight.double())], "several formats"),
        (lambda q, k: [q, k._replace(magnitude=k.magnitude.to("meta"))], "several devices"),
        (lambda q, k: [q, make_member(5, 9, 3, torch.float32, torch.float32)], "inputs of several sizes"),
    ],
)  # fmt: skip
def test_layers_that_do_not_fit(change, reason):
    x, _, members = make_siblings(5, 8, torch.float32)
    with pytest.raises(ValueError, match=reason):
        dora_siblings(x, change(members["q"], members["k"]))


def test_an_input_that_does_not_fit():
    _, _, members = make_siblings(5, 8, torch.float32)
    with pytest.raises(ValueError, match=r"x must be .* = \[\.\.\., 8\], got shape \[5, 9\]"):
        dora_siblings(torch.zeros(5, 9), list(members.values()))
    with pytest.raises(TypeError, match="one dtype outside autocast"):
        dora_siblings(torch.zeros(5, 8, dtype=torch.bfloat16), list(members.values()))


@pytest.mark.parametrize(
    ("tokens", "rank", "space"), [(512, 16, "token"), (8192, 16, "weight"), (512, 384, "token"), (8192, 384, "weight")]
)
def test_the_form_by_size_and_rank(tokens, rank, space):
    """Of Llama-3-8B's queries, keys and values in bf16 with fp32 adapters, without values."""
    with torch.device("meta"):
        members = [
            Member(
                torch.empty(N, 4096, dtype=torch.bfloat16),
                torch.empty(rank, 4096), torch.empty(N, rank), torch.empty(N), None, 2.0, NEAREST,
            )
            for N in (4096, 1024, 1024)
        ]  # fmt: skip
    plan = plan_siblings(members, tokens=tokens, dtype=torch.bfloat16, space="auto", impl="reference")
    assert plan.space == space
    assert "predicted to take less time" in plan.reason
