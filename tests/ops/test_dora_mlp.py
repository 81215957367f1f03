"""A gated MLP as one function: against the fp64 oracle, the layers one by one, and the base model."""

import pytest
import torch
import torch.nn.functional as F

import dora_kernels as dk
from dora_kernels.ops.dora_mlp import dora_mlp, plan_mlp
from dora_kernels.ops.members import Member
from dora_kernels.ops.output import OutputUse
from dora_kernels.ops.types import NEAREST
from tests.support.marks import slow
from tests.support.mlp import ACTIVATIONS, exact, make_mlp, parts, solved
from tests.support.oracle import relative_error
from tests.tolerances import ORACLE_FP64

every_space = pytest.mark.parametrize("space", ["token", "weight"])
every_impl = pytest.mark.parametrize("impl", ["reference", "triton"])


def _solve(x, grad_y, gate, up, down, **options):
    return solved(dora_mlp(x, gate, up, down, **options), x, parts(gate, up, down), grad_y)


def _layers(x, gate, up, down, activation, **options):
    """The MLP by `dora_linear`, layer by layer."""

    def layer(x, member):
        return dk.dora_linear(
            x, member.weight, member.lora_A, member.lora_B, member.magnitude,
            scaling=member.scaling, bias=member.bias, salt=member.rounding.salt, **options,
        )  # fmt: skip

    both = layer(x, gate).chunk(2, dim=-1) if up is None else (layer(x, gate), layer(x, up))
    return layer(ACTIVATIONS[activation](both[0]) * both[1], down)


@every_space
@every_impl
@pytest.mark.parametrize("stacked", [False, True], ids=["two-layers", "stacked"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_in_fp64(activation, bias, stacked, impl, space):
    problem = make_mlp(13, 11, 14, 3, torch.float64, bias=bias, stacked=stacked)
    found, expected = _solve(*problem, activation=activation, space=space, impl=impl), exact(*problem, activation)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= ORACLE_FP64, errors


@every_space
def test_errors_in_bf16_are_those_of_the_layers_at_most(space):
    """The mean over four seeds; both round to bf16, the block in fewer places."""
    block, layers = {}, {}
    for seed in range(4):
        x, grad_y, *members = problem = make_mlp(256, 128, 320, 16, torch.bfloat16, torch.float32, seed=seed)
        expected = exact(*problem, "silu")
        one_by_one = solved(_layers(x, *members, "silu", space=space), x, parts(*members), grad_y)
        for sums, found in ((block, _solve(*problem, activation="silu", space=space)), (layers, one_by_one)):
            for name in expected:
                sums[name] = sums.get(name, 0.0) + relative_error(found[name], expected[name]) / 4
    assert {name: block[name] / layers[name] for name in block if block[name] > 1.05 * layers[name]} == {}


@every_space
@every_impl
def test_fp16_in_which_a_gradient_of_the_magnitude_would_underflow(impl, space):
    problem = make_mlp(24, 32, 48, 8, torch.float16, torch.float32)
    if space == "weight":
        with pytest.raises(ValueError, match="underflows"):
            _solve(*problem, activation="silu", space=space, impl=impl)
        return
    found, expected = _solve(*problem, activation="silu", space=space, impl=impl), exact(*problem, "silu")
    # Two roundings of each value on its way, each of 2⁻¹¹, and dithered where the layers dither.
    assert {name: error for name in expected if (error := relative_error(found[name], expected[name])) > 4e-3} == {}


def _fresh(member):
    norm = torch.linalg.vector_norm(member.weight.double(), dim=1)
    return member._replace(
        lora_B=torch.zeros_like(member.lora_B, requires_grad=True),
        magnitude=norm.to(member.magnitude.dtype).requires_grad_(),
    )


@every_space
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stacked", [False, True], ids=["two-layers", "stacked"])
def test_a_fresh_adapter_leaves_the_models_bits(stacked, activation, space):
    """The stacked weight, and in token space both, are multiplied by products of the base's own shapes."""
    x, _, *members = make_mlp(24, 64, 96, 4, torch.bfloat16, torch.float32, stacked=stacked)
    gate, up, down = (member and _fresh(member) for member in members)
    both = (
        F.linear(x, gate.weight).chunk(2, dim=-1) if up is None else (F.linear(x, gate.weight), F.linear(x, up.weight))
    )
    expected = F.linear(ACTIVATIONS[activation](both[0]) * both[1], down.weight)
    found = dora_mlp(x, gate, up, down, activation=activation, space=space)
    if space == "token" or stacked:
        assert torch.equal(found, expected)
    else:
        assert relative_error(found, expected) <= 2.0**-8  # the stacked GEMM may sum in another order


def test_what_is_kept():
    """x, both products and down's output, and what has the size of a weight's side or of h."""
    x, _, *members = make_mlp(512, 64, 96, 4, torch.bfloat16, torch.float32)
    x = x.detach().clone().requires_grad_()  # in memory of its own
    own = {t.untyped_storage().data_ptr() for m in members for t in m[:4]}
    for space, h in (("token", 512 * (4 + 4 + 6)), ("weight", 0)):
        kept = {}

        def pack(tensor, kept=kept):
            if (storage := tensor.untyped_storage()).data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            dora_mlp(x, *members, activation="silu", space=space)
        activations = 2 * (512 * 64 + 2 * 512 * 96 + 512 * 64 + h)
        small = 2 * (4 * 2 * 64 + 6 * 96) * (space == "token") + 2 * 4 * (2 * 96 + 64)  # A in bf16; n and g
        assert activations <= sum(kept.values()) <= activations + small, space


@every_space
def test_an_output_that_is_written_over_is_computed_again(space):
    x, grad_y, *members = make_mlp(24, 32, 48, 4, torch.float64)
    expected = _solve(x, grad_y, *members, activation="silu", space=space)
    use = OutputUse()
    members[-1] = members[-1]._replace(use=use)
    y = dora_mlp(x, *members, activation="silu", space=space)
    y.mul_(1.0)
    found = solved(y, x, parts(*members), grad_y)
    assert use.is_written
    assert max(relative_error(found[name], expected[name]) for name in expected) <= ORACLE_FP64


def test_it_differentiates_once():
    x, grad_y, *members = make_mlp(5, 8, 8, 2, torch.float64)
    y = dora_mlp(x, *members, activation="silu")
    with pytest.raises(RuntimeError, match="cannot differentiate twice"):
        torch.autograd.grad(y, x, grad_y, create_graph=True)


@every_space
def test_a_graph_that_is_kept_can_be_walked_again(space):
    """The pass that writes a over da must not write over what is kept."""
    x, grad_y, *members = make_mlp(5, 8, 8, 2, torch.float64)
    y = dora_mlp(x, *members, activation="silu", space=space)
    first = torch.autograd.grad(y, x, grad_y, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x, grad_y)[0], first)


@pytest.mark.parametrize("space", ["token", slow("weight")])
@pytest.mark.parametrize("stacked", [False, slow(True)], ids=["two-layers", "stacked"])
def test_it_compiles_whole(stacked, space):
    x, grad_y, *members = make_mlp(6, 8, 16, 2, torch.float32, stacked=stacked)
    expected = _solve(x, grad_y, *members, activation="silu", space=space)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x):
        return dora_mlp(x, *members, activation="silu", space=space)

    found = solved(compiled(x), x, parts(*members), grad_y)
    assert max(relative_error(found[name], expected[name]) for name in expected) <= 1e-6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda gate, up, down: (gate, up._replace(scaling=1.0), down), "differ in their scaling"),
        (lambda gate, up, down: (gate, up._replace(bias=torch.zeros(16)), down), "one of gate and up has a bias"),
        (lambda gate, up, down: (gate, down._replace(weight=down.weight[:12]), down), "features or their rank"),
        (lambda gate, up, down: (gate, up._replace(lora_A=up.lora_A.detach()), down), "a factor does not train"),
        (lambda gate, up, down: (gate, up, down._replace(bias=torch.zeros(8, requires_grad=True))), "a bias trains"),
        (lambda gate, up, down: (gate, up, down._replace(weight=down.weight.double())), "several formats"),
        (lambda gate, up, down: (gate, up, down._replace(magnitude=down.magnitude.to("meta"))), "several devices"),
        (lambda gate, up, down: (gate, _wider(up), down), "inputs of several sizes"),
        (lambda gate, up, down: (gate, up, _wider(down)), "other inputs than gate and up have features"),
    ],
)  # fmt: skip
def test_layers_that_do_not_fit(change, reason):
    x, _, *members = make_mlp(5, 8, 16, 2, torch.float32)
    with pytest.raises(ValueError, match=reason):
        dora_mlp(x, *change(*members), activation="silu")


def _wider(member):
    return member._replace(weight=member.weight.repeat(1, 2), lora_A=member.lora_A.repeat(1, 2))


@pytest.mark.parametrize("shape", [(), (5, 9)])
def test_an_input_that_does_not_fit(shape):
    _, _, *members = make_mlp(5, 8, 16, 2, torch.float32)
    with pytest.raises(ValueError, match=r"x must be .* 8"):
        dora_mlp(torch.zeros(shape), *members, activation="silu")


def test_an_activation_that_is_not_known():
    x, _, *members = make_mlp(5, 8, 16, 2, torch.float32)
    with pytest.raises(ValueError, match="silu, gelu_tanh, got 'relu'"):
        dora_mlp(x, *members, activation="relu")


def _of_llama(rank):
    """Llama-3-8B's MLP in bf16 with fp32 adapters, without values."""

    def member(N, K):
        factors = torch.empty(rank, K), torch.empty(N, rank), torch.empty(N)
        return Member(torch.empty(N, K, dtype=torch.bfloat16), *factors, None, 2.0, NEAREST)

    with torch.device("meta"):
        return member(14336, 4096), member(14336, 4096), member(4096, 14336)


@pytest.mark.parametrize(
    ("tokens", "rank", "spaces"),
    [(512, 16, ("token", "token")), (8192, 16, ("token", "weight")), (8192, 384, ("weight", "token"))],
)
def test_the_form_by_size_and_rank(tokens, rank, spaces):
    plan = plan_mlp(*_of_llama(rank), tokens=tokens, dtype=torch.bfloat16, space="auto", impl="reference")
    assert (plan.gate_up.space, plan.down.space) == spaces
