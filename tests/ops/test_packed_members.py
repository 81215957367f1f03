"""FP8, FP4 and int4 inside blocks: a gated MLP and layers of one input against fp64 over the decoded weights."""

import pytest
import torch

from dora_kernels.ops.base_weights import weight_of
from dora_kernels.ops.dora_mlp import dora_mlp
from dora_kernels.ops.dora_siblings import dora_siblings
from tests.support import mlp, siblings
from tests.support.fp4 import linear_fp4
from tests.support.fp8 import decoded, linear_fp8
from tests.support.int4 import linear_awq, linear_compressed, linear_gptq
from tests.support.oracle import relative_error
from tests.tolerances import ORACLE_FP32

FP32 = torch.float32


def fp8(N, K):
    layer = linear_fp8(N, K)
    return layer, decoded(layer)


KINDS = {
    "fp8": fp8,
    "nvfp4": lambda N, K: linear_fp4("nvfp4", N, K),
    "compressed_tensors": lambda N, K: linear_compressed(N, K, 16, FP32, symmetric=False),
    "act_order": lambda N, K: linear_gptq(N, K, 16, FP32, act_order=True),
    "awq": lambda N, K: linear_awq(N, K, 16, FP32),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_way = pytest.mark.parametrize(
    ("space", "impl"), [("token", "triton"), ("weight", "triton"), ("token", "reference"), ("weight", "reference")]
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def packed(member, kind):
    """The member over a packed weight, and over that weight as a matrix."""
    layer, matrix = kind(*member.weight.shape)
    return member._replace(weight=weight_of(layer)), member._replace(weight=matrix)


@every_kind
@every_way
def test_a_gated_mlp(kind, space, impl):
    x, grad_y, *members = mlp.make_mlp(9, 32, 48, 4, FP32)
    pairs = [packed(member, kind) for member in members]
    gate, up, down = (ours for ours, _ in pairs)
    y = dora_mlp(x, gate, up, down, activation="silu", space=space, impl=impl)
    found = mlp.solved(y, x, mlp.parts(gate, up, down), grad_y)
    expected = mlp.exact(x, grad_y, *(matrix for _, matrix in pairs), "silu")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) <= 2 * ORACLE_FP32, name


@every_kind
@every_way
def test_layers_of_one_input(kind, space, impl):
    x, grads, members = siblings.make_siblings(
        9, 32, FP32, biases="k", sizes={"q": (24, 3), "k": (8, 16), "v": (16, 40)}
    )
    pairs = {name: packed(member, kind) for name, member in members.items()}
    ours = {name: pair[0] for name, pair in pairs.items()}
    found = siblings.solved(dora_siblings(x, list(ours.values()), space=space, impl=impl), x, grads, ours)
    expected = siblings.exact(x, grads, {name: pair[1] for name, pair in pairs.items()})
    assert siblings.worst(found, expected) <= ORACLE_FP32


@pytest.mark.parametrize("stranger", ["compressed_tensors", "plain"])
def test_another_format_beside_it_is_refused(stranger):
    _, _, members = siblings.make_siblings(9, 32, FP32, sizes={"q": (24, 3), "k": (8, 16)})
    first, second = members.values()
    first = packed(first, fp8)[0]
    second = second if stranger == "plain" else packed(second, KINDS[stranger])[0]
    with pytest.raises(ValueError, match="its weights have several formats"):
        dora_siblings(torch.randn(9, 32), [first, second])
