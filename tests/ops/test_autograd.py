"""What `DoraLinearFunction` keeps, computes and leaves alone between forward and backward."""

import itertools

import pytest
import torch

from dora_kernels.ops import dispatch, dora_linear
from dora_kernels.ops.chunked import mm_fp32
from dora_kernels.ops.types import Rounding
from tests.support.buffers import count_launches
from tests.support.leaves import TRAINABLE, forward, leaves_of
from tests.support.oracle import NAMES, make_problem, relative_error, solve
from tests.tolerances import TWIN

SPACES = pytest.mark.parametrize("space", ["token", "weight"])
IMPLS = pytest.mark.parametrize("impl", ["triton", "reference"])
M, N, K, R = 40, 48, 56, 3


def problem(dtype=torch.float32, bias=True):
    return make_problem(M, N, K, R, dtype=dtype, adapter_dtype=torch.float32, bias=bias)


SUBSETS = [names for size in range(1, 6) for names in itertools.combinations(TRAINABLE, size)]


@pytest.fixture(scope="module")
def full_gradients():
    """Per space, each gradient where all are asked for."""
    return {
        space: dict(zip(TRAINABLE, list(solve(problem(), space=space, impl="triton").values())[1:]))
        for space in ("token", "weight")
    }


@SPACES
@pytest.mark.parametrize("trained", SUBSETS, ids="-".join)
def test_every_subset_of_gradients(trained, space, full_gradients, monkeypatch):
    p, returned = problem(), []
    backward = dora_linear.DoraLinearFunction.backward
    monkeypatch.setattr(
        dora_linear.DoraLinearFunction,
        "backward",
        lambda ctx, grad: returned.append(backward(ctx, grad)) or returned[0],
    )
    tensors = leaves_of(p, trained)
    y = forward(p, tensors, space=space, impl="triton")
    for name, grad in zip(trained, torch.autograd.grad(y, [tensors[name] for name in trained], p.grad_y)):
        # dyᵀh is a GEMM where nothing else needs the pass over dy: another order of summation.
        alone = name == "lora_B" and not {"magnitude", "bias"} & set(trained)
        tolerance = TWIN[grad.dtype] if alone else 0.0
        assert relative_error(grad, full_gradients[space][name]) <= tolerance, name
    # The second place is that of the dropped input, which does not exist here.
    by_name = dict(zip(TRAINABLE, (returned[0][0], *returned[0][2:6])))
    assert {name for name, grad in by_name.items() if grad is not None} == set(trained), "nothing else is computed"


@SPACES
def test_no_work_for_what_is_not_needed(space):
    p = problem(bias=False)
    tensors = leaves_of(p, trained=["x"])
    y = forward(p, tensors, space=space, impl="triton")
    with count_launches() as launches:
        torch.autograd.grad(y, tensors["x"], p.grad_y)
    expected = {"token": {"_rescale_bwd_kernel": 1, "_scaled_cast_kernel": 1}, "weight": {"_merge_scale_kernel": 1}}
    assert launches == expected[space]


@SPACES
@IMPLS
@pytest.mark.parametrize("trained", [(), TRAINABLE], ids=["nothing", "all"])
def test_nothing_is_saved_without_autograd(trained, impl, space):
    p, saved = problem(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), torch.no_grad():
        y = forward(p, leaves_of(p, trained), space=space, impl=impl)
    assert y.grad_fn is None
    assert not saved


SAVED_OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "fp16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "dropout": {"lora_dropout": 0.5},
    "peft_dropout": {"lora_dropout": 0.5, "dropout_mode": "peft"},
    "peft_dropout_bias": {"lora_dropout": 0.5, "dropout_mode": "peft", "bias": True},
}


SAVED_CASES = [("token", name) for name in SAVED_OPTIONS] + [("weight", name) for name in ("plain", "bias", "bf16")]


@IMPLS
@pytest.mark.parametrize(("space", "case"), SAVED_CASES, ids=map("-".join, SAVED_CASES))
def test_what_is_kept_between_forward_and_backward(space, case, impl):
    options = dict(SAVED_OPTIONS[case])
    dtype, bias = options.pop("dtype", torch.float32), options.pop("bias", False)
    p, saved = problem(dtype, bias), {}
    tensors = leaves_of(p)

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward(p, tensors, space=space, impl=impl, training=True, **options)
    own = {t.untyped_storage().data_ptr() for t in (p.weight, *tensors.values())}
    fresh = [(tuple(t.shape), t.dtype) for pointer, t in saved.items() if pointer not in own]
    shapes = [shape for shape, _ in fresh]
    assert shapes.count((N, K)) == 0, "the weight itself is kept, and no other of its size"
    assert shapes.count((M, N)) <= 1, "one of the output's size: y, or the product before the bias"
    dropped = shapes.count((M, K))
    # The dropped input and, on the input's side, what nn.Dropout keeps: never a mask of the output's size.
    assert dropped <= (2 if options else 0)
    large = {(M, N), (M, K)}
    small = sum(torch.Size(shape).numel() for shape in shapes if shape not in large)
    assert small <= M * R + 2 * N + R * K, "h, n, g, and A in the input's dtype"
    y.backward(p.grad_y)


@SPACES
@pytest.mark.parametrize(
    ("trained", "kept"),
    [
        (("lora_A", "lora_B", "magnitude"), {"x", "y"}),
        (("lora_B", "magnitude"), {"y"}),
        (("lora_A", "lora_B"), {"x"}),
        (("x", "lora_B"), set()),
    ],
    ids=["all", "without A", "without m", "B alone"],
)
def test_what_no_gradient_needs_is_not_kept(trained, kept, space):
    p, saved = problem(bias=False), set()
    tensors = leaves_of(p, trained)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.data_ptr()) or t, lambda t: t):
        y = forward(p, tensors, space=space, impl="reference")
    assert {name for name, t in {"x": tensors["x"], "y": y}.items() if t.data_ptr() in saved} == kept


@SPACES
@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_and_the_incoming_gradient_are_never_written(dtype, impl, space):
    p = problem(dtype)
    tensors = leaves_of(p) | {"weight": p.weight, "grad_y": p.grad_y}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    leaves = {name: tensors[name] for name in TRAINABLE}
    y = forward(p, leaves, space=space, impl=impl)
    grads = torch.autograd.grad(y, list(leaves.values()), p.grad_y)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
    # Nor do results share memory with them: a residual stream's gradient goes to several consumers.
    theirs = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert not {grad.untyped_storage().data_ptr() for grad in grads} & theirs


@SPACES
@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_three_runs_are_bit_equal(dtype, impl, space):
    p = make_problem(300, 33, 29, 5, dtype=dtype, adapter_dtype=torch.float32, bias=True)
    first, *others = (solve(p, space=space, impl=impl) for _ in range(3))
    for other, name in itertools.product(others, NAMES):
        assert torch.equal(other[name], first[name]), name


@SPACES
def test_backward_twice_with_a_retained_graph(space):
    p = problem()
    tensors = leaves_of(p)
    y = forward(p, tensors, space=space, impl="triton")
    first, second = (torch.autograd.grad(y, list(tensors.values()), p.grad_y, retain_graph=True) for _ in range(2))
    for name, a, b in zip(tensors, first, second):
        assert torch.equal(a, b), name


@SPACES
@IMPLS
def test_gradients_of_fp32_adapters_are_fp32_sums(impl, space):
    """Over a bf16 base: a product that passed through 16 bits would have nothing behind the eighth bit."""
    solution = solve(problem(torch.bfloat16), space=space, impl=impl)
    for name in ("dA", "dB", "dm"):
        rounded = solution[name].bfloat16().float()
        assert (rounded != solution[name]).float().mean() > 0.9, name


def test_a_product_in_fp32_adds_up_all_its_chunks(monkeypatch):
    a, b = torch.randn(3, 50).bfloat16(), torch.randn(50, 5).bfloat16()
    monkeypatch.setattr("dora_kernels.ops.chunked.CHUNK_ELEMENTS", 64)
    assert relative_error(mm_fp32(a, b), a.double() @ b.double()) <= TWIN[torch.float32]


@IMPLS
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_the_adapters_gradients_in_fp16_do_not_depend_on_xs(bias, impl):
    """There g reaches dA through dZ, which must be made even where x, as in a first layer, needs no gradient."""
    p = problem(torch.float16, bias)
    everything, adapters = leaves_of(p), leaves_of(p, ("lora_A", "lora_B", "magnitude"))
    names = ("lora_A", "lora_B", "magnitude")
    gradients = []
    for tensors in (everything, adapters):
        y = forward(p, tensors, space="token", impl=impl)
        gradients.append(torch.autograd.grad(y, [tensors[name] for name in names], p.grad_y))
    for name, one, other in zip(names, *gradients):
        assert torch.equal(one, other), name


@IMPLS
@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
def test_the_backward_merges_to_the_bits_of_the_forward(rounding, impl):
    """Another pattern of dither would be as exact on average, and the gradient that of another function."""
    p, salt = problem(torch.bfloat16, bias=False), 0xC0FFEE
    factors = (p.weight, p.lora_A, p.lora_B, p.magnitude, p.scaling)
    merged, *_ = dispatch.implementation(impl).merge(*factors, dtype=torch.bfloat16, rounding=Rounding(rounding, salt))
    solution = solve(p, space="weight", impl=impl, rounding=rounding, salt=salt)
    assert torch.equal(solution["y"], p.x @ merged.T)
    assert torch.equal(solution["dx"], p.grad_y @ merged)


@IMPLS
def test_an_overflow_in_fp16_reaches_the_gradients(impl):
    """A loss scale too large gives infinity, on which a GradScaler skips the step, and no large number in its place."""
    p = problem(torch.float16, bias=False)
    p.weight.mul_(1e-3)  # so small that no sum overflows by itself
    p.lora_B.zero_()
    p.magnitude = 4 * p.weight.float().norm(dim=1)
    tensors = leaves_of(p)
    y = forward(p, tensors, impl=impl)  # g is 4, and dZ = dy ⊙ g beyond 65,504
    y.backward(torch.full_like(y, 3e4))
    assert not tensors["x"].grad.isfinite().all()
