"""Layers of one input as one node of autograd's graph: what it keeps, what may be missing, and what may be written."""

import pytest
import torch

from dora_kernels.ops.dora_siblings import dora_siblings
from dora_kernels.ops.output import OutputUse
from tests.support.marks import slow
from tests.support.mlp import FACTORS
from tests.support.oracle import relative_error
from tests.support.siblings import SIZES, exact, leaves, make_siblings, solve, solved, worst
from tests.tolerances import ORACLE_FP64

every_space = pytest.mark.parametrize("space", ["token", "weight"])


@every_space
@pytest.mark.parametrize("unused", ["q", "v", "kv"])
def test_an_output_that_is_not_used(unused, space):
    """Its layer gets no gradient, as if it had not been called."""
    x, grads, members = make_siblings(13, 11, torch.float64)
    grads = dict(zip(members, grads))
    outputs = dict(zip(members, dora_siblings(x, list(members.values()), space=space)))
    used = [name for name in members if name not in unused]
    named = leaves(x, members)
    found = torch.autograd.grad(
        [outputs[name] for name in used], list(named.values()), [grads[name] for name in used], allow_unused=True
    )
    assert {name for name, gradient in zip(named, found) if gradient is None} == {
        f"{name}.{factor}" for name in unused for factor in FACTORS
    }
    expected = exact(x, [grads[name] for name in used], {name: members[name] for name in used})
    assert max(relative_error(g, expected[name]) for name, g in zip(named, found) if g is not None) <= ORACLE_FP64


@every_space
def test_an_input_that_needs_no_gradient(space):
    x, grads, members = make_siblings(13, 11, torch.float64)
    expected = exact(x, grads, members)
    outputs = dora_siblings(x.detach(), list(members.values()), space=space)
    named = {name: leaf for name, leaf in leaves(x, members).items() if name != "x"}
    found = dict(zip(named, torch.autograd.grad(outputs, list(named.values()), grads)))
    assert max(relative_error(found[name], expected[name]) for name in named) <= ORACLE_FP64


@every_space
def test_an_input_of_more_dimensions_and_gradients_of_any_layout(space):
    x, grads, members = make_siblings(12, 11, torch.float64)
    expected = exact(x, grads, members)
    outputs = dora_siblings(x.view(3, 4, 11), list(members.values()), space=space)
    assert [tuple(y.shape) for y in outputs] == [(3, 4, features) for features, _ in SIZES.values()]
    columns = [grad.T.contiguous().T.view(3, 4, -1) for grad in grads]
    found = solved(outputs, x, columns, members)
    assert max(relative_error(found[name], expected[name]) for name in leaves(x, members)) <= ORACLE_FP64


@every_space
@pytest.mark.parametrize("biases", ["", "qkv"], ids=["no-bias", "biases"])
def test_nothing_is_kept_that_the_layers_do_not_keep(biases, space):
    x, _, members = make_siblings(128, 64, torch.bfloat16, torch.float32, biases)
    members = list(members.values())
    x = x.detach().clone().requires_grad_()  # in memory of its own
    own = {t.untyped_storage().data_ptr() for member in members for t in member[:5] if t is not None}

    def kept(call):
        found, packed = {}, []

        def pack(tensor):
            if (storage := tensor.untyped_storage()).data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
                packed.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = call()
        return sum(found.values()), sum(packed), outputs

    found, packed, _ = kept(lambda: dora_siblings(x, members, space=space))
    features, ranks = (sum(getattr(member, size) for member in members) for size in ("features", "rank"))
    activations = 2 * (128 * 64 + 128 * features + (128 * ranks if space == "token" else 0))
    small = 2 * ranks * 64 * (space == "token") + 2 * 4 * features  # A in bf16; n and g
    assert activations < found <= activations + small
    assert found == packed, "no piece twice, as a view of another"


@every_space
@pytest.mark.parametrize("written", ["q", "k", "qv"])
def test_an_output_that_is_written_over_is_computed_again(written, space):
    x, grads, members = make_siblings(24, 32, torch.float64)
    uses = {name: OutputUse() for name in members}
    members = {name: member._replace(use=uses[name]) for name, member in members.items()}
    expected = exact(x, [2 * g if name in written else g for name, g in zip(members, grads)], members)
    outputs = dora_siblings(x, list(members.values()), space=space)
    others = {name: y.clone() for name, y in zip(members, outputs)}
    for name, y in zip(members, outputs):
        if name in written:
            y.mul_(2.0)
    assert all(torch.equal(y, others[name]) for name, y in zip(members, outputs) if name not in written)
    found = solved(outputs, x, grads, members)
    assert {name for name, use in uses.items() if use.is_written} == set(written)
    assert max(relative_error(found[name], expected[name]) for name in leaves(x, members)) <= ORACLE_FP64
    with pytest.raises(ValueError, match="the model writes over an output"):
        dora_siblings(x, list(members.values()), space=space)


def test_it_differentiates_once():
    x, grads, members = make_siblings(5, 8, torch.float64)
    outputs = dora_siblings(x, list(members.values()))
    with pytest.raises(RuntimeError, match="cannot differentiate twice"):
        torch.autograd.grad(outputs, x, grads, create_graph=True)


@every_space
def test_a_graph_that_is_kept_can_be_walked_again(space):
    x, grads, members = make_siblings(5, 8, torch.float64)
    outputs = dora_siblings(x, list(members.values()), space=space)
    first = torch.autograd.grad(outputs, x, grads, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(outputs, x, grads)[0], first)


@every_space
@pytest.mark.parametrize("biases", [slow(""), "qkv"], ids=["no-bias", "biases"])
def test_it_compiles_whole(biases, space):
    x, grads, members = make_siblings(6, 8, torch.float32, biases=biases)
    expected = solve(x, grads, members, space=space)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x):
        q, k, v = dora_siblings(x, list(members.values()), space=space)
        return q * 2, k, v

    q, k, v = compiled(x)
    found = solved((q, k, v), x, [grads[0] / 2, *grads[1:]], members) | {"q": q.detach() / 2}
    assert worst(found, expected) <= 1e-6


def test_under_autocast():
    x, grads, members = make_siblings(24, 32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = dora_siblings(x, list(members.values()))
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    found = solved(outputs, x, [grad.bfloat16() for grad in grads], members)
    assert found["x"].dtype == torch.float32
    assert worst(found, exact(x, grads, members)) < 0.03  # a few roundings to 8 bits, of small sums
