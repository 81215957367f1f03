"""The two passes of a gated MLP: each kernel against its twin, and both against autograd of whole layers in fp64."""

import pytest
import torch
import torch.nn.functional as F

from dora_kernels.ops import kernels, reference
from dora_kernels.ops.types import GluFactors, Rounding
from tests.support.buffers import LAYOUTS
from tests.support.marks import slow
from tests.support.oracle import relative_error
from tests.support.twins import DTYPES, compare
from tests.tolerances import ORACLE_FP64, TWIN

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# (tokens, features of gate and of up, rank)
SHAPES = {
    "small": (5, 3, 1),
    "odd": (37, 29, 7),
    "multiples": (32, 64, 16),
    "rank-24": (9, 70, 24),
    "rank-40": (19, 33, 40),
}
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
# (activation, whether there is a bias, whether both layers have one h); each pair of values is here.
OPTIONS = (("silu", False, False), ("silu", True, True), ("gelu_tanh", True, False), ("gelu_tanh", False, True))
ROUNDINGS = (Rounding("dithered", 3), Rounding("dithered", 17))
IMPLEMENTATIONS = {"kernels": kernels, "reference": reference}

# In the suite every pair of types has two shapes, and every shape the types that are used most.
CASES = {
    f"{shape}-{dtypes}": (sizes, pair)
    if shape in ("odd", "rank-40") or dtypes in ("bf16-fp32", "fp32")
    else slow(sizes, pair)
    for shape, sizes in SHAPES.items()
    for dtypes, pair in DTYPES.items()
}
every_case = pytest.mark.parametrize(("shape", "dtypes"), CASES.values(), ids=CASES)
every_space = pytest.mark.parametrize("space", ["token", "weight"])
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
both = pytest.mark.parametrize("ops", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def passes(M, N, R, dtype=FP32, adapter_dtype=None, *, bias=False, one_h=False):
    """grad_a, gate and up as halves of one tensor, factors, bias, and n."""
    generator, adapter_dtype = torch.Generator().manual_seed(0), adapter_dtype or dtype

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=FP64)

    acc = FP64 if FP64 in (dtype, adapter_dtype) else FP32
    gate, up = normal(M, 2 * N).mul(2).to(dtype).chunk(2, dim=1)
    lora_B = normal(2 * N, R).div(10 * R**0.5).to(adapter_dtype).chunk(2)
    h = normal(M, R if one_h else 2 * R).to(dtype)
    factors = GluFactors(h, lora_B, (1 + 0.1 * normal(2 * N)).to(acc), 1.7)
    return (
        normal(M, N).to(dtype), gate, up, factors, normal(2 * N).to(dtype) if bias else None,
        (2 + 0.1 * normal(2 * N)).to(acc),
    )  # fmt: skip


def compare_both(grad_a, gate, up, factors, bias, norm, space, activation):
    """Forward and backward; the a of both is the same, but for the order in which tiles of two shapes sum h Bᵀ."""
    rounded, dtype = gate.dtype, factors.lora_B[0].dtype
    used = factors if space == "token" else None
    (a,) = compare("glu_fwd", gate, up, used, bias, activation=activation)
    # One layer that holds both is rounded as one.
    roundings = ROUNDINGS[:1] if factors.h.shape[1] == factors.rank else ROUNDINGS
    options = {"space": space, "activation": activation, "dtype": dtype, "roundings": roundings}
    # act(gate) is rounded: where the order of a sum moves it, dm and dB move with it.
    *_, again = compare("glu_bwd", grad_a, gate, up, factors, bias, norm, written=(0,), rounded=rounded, **options)
    assert relative_error(again, a) <= TWIN[rounded]


@every_space
@every_case
def test_the_kernels_are_their_twins(shape, dtypes, space):
    for activation, bias, one_h in OPTIONS:
        compare_both(*passes(*shape, *dtypes, bias=bias, one_h=one_h), space, activation)


@every_space
@pytest.mark.parametrize(("features", "rank"), [(9, 7), (9, 40), (16, 40), (16, 70)])
def test_in_chunks(features, rank, space):
    """Enough tokens that several programs share a feature; ranks that one block holds, and others."""
    compare_both(*passes(300, features, rank, BF16, FP32, bias=True), space, "silu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Two tensors of any strides; the halves of one are in every other test."""
    lay_out = LAYOUTS[layout]
    grad_a, gate, up, factors, bias, norm = passes(18, 14, 6, BF16, FP32, bias=True)
    factors = factors._replace(h=lay_out(factors.h), lora_B=tuple(map(lay_out, factors.lora_B)))
    grad_a = grad_a if layout == "expanded" else lay_out(grad_a)
    compare_both(grad_a, lay_out(gate), lay_out(up), factors, lay_out(bias), norm, "token", "silu")


@every_activation
@every_space
@both
def test_gradients_are_those_of_whole_layers(ops, space, activation):
    """In fp64, of products, B and m; by autograd through a W' that is written out, with its norm detached."""
    M, N, K, R, scaling = 21, 11, 13, 5, 1.7
    x, weight, lora_A = torch.randn(M, K).double(), torch.randn(2 * N, K).double(), torch.randn(2 * R, K).double()
    lora_B, bias = torch.randn(2 * N, R).double().requires_grad_(), torch.randn(2 * N).double()
    magnitude = torch.rand(2 * N).double().add(1).requires_grad_()
    update = torch.cat([lora_B[:N] @ lora_A[:R], lora_B[N:] @ lora_A[R:]])
    adapted = weight + scaling * update
    norm = adapted.norm(dim=1).detach()
    outputs = x @ ((magnitude / norm)[:, None] * adapted).T
    outputs.retain_grad()
    gate, up = (outputs + bias).chunk(2, dim=1)
    expected, grad_a = ACTIVATIONS[activation](gate) * up, torch.randn(M, N).double()
    expected.backward(grad_a)
    scale = magnitude.detach() / norm
    h = torch.cat([x @ lora_A[:R].T, x @ lora_A[R:].T], dim=1)
    factors = GluFactors(h, lora_B.detach().chunk(2), scale, scaling)
    products, expected_products = outputs.detach(), outputs.grad
    if space == "token":
        products, expected_products = x @ weight.T, expected_products * scale
    gate, up = products.chunk(2, dim=1)
    a = ops.glu_fwd(gate, up, factors if space == "token" else None, bias, activation=activation)
    found = ops.glu_bwd(
        grad_a, gate, up, factors, bias, norm, space=space, activation=activation, dtype=FP64, roundings=ROUNDINGS
    )
    truths = {
        "a": (a, expected),
        "a again": (grad_a, expected),
        "products": (found.products, expected_products),
        "dm": (found.magnitude, magnitude.grad),
        "dB": (found.lora_B, lora_B.grad),
        "s B": (found.scaled_B, scaling * lora_B * (1 if space == "token" else scale[:, None])),
    }
    assert {name: relative_error(*pair) > ORACLE_FP64 for name, pair in truths.items()} == dict.fromkeys(truths, False)


@every_activation
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@both
def test_a_fresh_adapter_leaves_the_bits_of_the_model(ops, dtype, activation):
    """In token space with g = 1 and B = 0 and in weight space: act(gate) is stored in 16 bits, then multiplied."""
    _, gate, up, factors, _, _ = passes(64, 40, 3, dtype)
    factors = factors._replace(lora_B=tuple(torch.zeros(2, 40, 3)), scale=torch.ones(80))
    expected = ACTIVATIONS[activation](gate) * up
    for used in (None, factors):
        a = ops.glu_fwd(gate, up, used, None, activation=activation)
        # Two libraries may round a value beside a boundary apart, and gelu's tail, where 1 + tanh cancels. Without the
        # first rounding a third of the values differ.
        assert a.ne(expected).float().mean() <= 1e-2


@every_activation
@pytest.mark.parametrize("dtype", [torch.float16, BF16, FP32, FP64], ids=str)
@both
def test_gates_of_any_size(ops, dtype, activation):
    """act is x or 0 and its derivative 1 or 0, and no step of either is NaN."""
    most = torch.finfo(dtype).max
    sizes = torch.tensor([100.0, 1e3, 5e4, 1e19, 1e30, 3e38, most], dtype=FP64).clamp(max=most).to(dtype)
    gate, positive = torch.cat([sizes, -sizes])[None], torch.arange(2 * len(sizes))[None] < len(sizes)
    factors, ones = passes(1, gate.shape[1], 1, dtype)[3], torch.ones_like(gate)
    a = ops.glu_fwd(gate, ones, None, None, activation=activation)
    assert torch.allclose(a, gate.where(positive, 0), rtol=1e-6, atol=1e-30)
    options = {"space": "weight", "activation": activation, "dtype": dtype, "roundings": ROUNDINGS}
    grads = ops.glu_bwd(ones.clone(), gate, ones, factors, None, factors.scale, **options).products
    assert torch.allclose(grads[:, : gate.shape[1]], positive.to(dtype), atol=1e-30)


@every_space
@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)], ids=str)
@both
def test_no_tokens_or_features(ops, shape, rank, space):
    (M, N), (grad_a, gate, up, factors, bias, norm) = shape, passes(*shape, rank, BF16, FP32, bias=True)
    assert ops.glu_fwd(gate, up, factors if space == "token" else None, bias, activation="silu").shape == (M, N)
    options = {"space": space, "activation": "silu", "dtype": FP32, "roundings": ROUNDINGS}
    grads = ops.glu_bwd(grad_a, gate, up, factors, bias, norm, **options)
    assert [grad.shape for grad in grads] == [(M, 2 * N), (2 * N,), (2 * N, rank), (2 * N, rank)]
    assert grads.magnitude.eq(0).all() and grads.lora_B.eq(0).all()


@pytest.mark.parametrize("mode", ["dithered", "nearest"])
@pytest.mark.parametrize("one_layer", [False, True], ids=["two-layers", "one-layer"])
@every_space
@both
def test_what_B_becomes_for_dh_has_the_bits_of_its_own_cast(ops, space, one_layer, mode):
    grad_a, gate, up, factors, _, norm = passes(3, 37, 5, BF16, FP32, one_h=one_layer)
    lora_B, parts = torch.cat(factors.lora_B), 1 if one_layer else 2
    roundings = tuple(rounding._replace(mode=mode) for rounding in ROUNDINGS[:parts])
    scales = factors.scale.chunk(parts) if space == "weight" else [None] * parts
    found = ops.glu_bwd(
        grad_a, gate, up, factors, None, norm, space=space, activation="silu", dtype=FP32, roundings=roundings
    )
    expected = [
        ops.scaled_cast(own, BF16, scale=scale, scaling=factors.scaling, rounding=rounding)
        for own, scale, rounding in zip(lora_B.chunk(parts), scales, roundings)
    ]
    assert torch.equal(found.scaled_B, torch.cat(expected))


@both
def test_zero_output_features(ops):
    """A feature whose norm is zero gives no gradient to its magnitude."""
    grad_a, gate, up, factors, _, norm = passes(6, 5, 2)
    norm[[1, 7]], factors.scale[[1, 7]] = 0, 0
    for space in ("token", "weight"):
        options = {"space": space, "activation": "silu", "dtype": FP32, "roundings": ROUNDINGS}
        found = ops.glu_bwd(grad_a.clone(), gate, up, factors, None, norm, **options)
        assert found.magnitude[[1, 7]].eq(0).all() and found.magnitude[[0, 8]].ne(0).all()
        assert all(grad.isfinite().all() for grad in found)


@pytest.mark.parametrize("name", ["grad_a", "gate", "up"])
def test_past_two_to_the_31(name, tmp_path):
    """The second block of tokens begins 2³¹ elements behind the first, in a file with holes."""
    M, N, stride, first = 34, 5, 2**26, 2**31
    grad_a, gate, up, factors, _, norm = passes(M, N, 2, BF16, FP32)
    near = {"grad_a": grad_a, "gate": gate, "up": up}
    file = torch.from_file(str(tmp_path / name), shared=True, size=first + M * stride, dtype=BF16)
    far = near | {"grad_a": grad_a.clone()}
    far |= {name: file.as_strided((M, N), (stride, 1), first).copy_(near[name])}
    options = {"space": "token", "activation": "silu", "dtype": FP32, "roundings": ROUNDINGS}
    forward, backward = [], []
    for tensors in (near, far):
        forward.append(kernels.glu_fwd(tensors["gate"], tensors["up"], factors, None, activation="silu"))
        backward.append([*kernels.glu_bwd(*tensors.values(), factors, None, norm, **options), tensors["grad_a"]])
    assert torch.equal(*forward) and all(torch.equal(*pair) for pair in zip(*backward))
