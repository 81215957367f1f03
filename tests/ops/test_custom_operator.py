"""The operator that stands for our kernels in a compiled graph: what it is told, and PyTorch's own checks of it."""

import pytest
import torch

from dora_kernels.ops import custom_operator, kernels
from dora_kernels.ops.base_weights import weight_of
from dora_kernels.ops.types import Adapted, GluFactors, NormScale, Rounding
from tests.support.int4 import linear_awq
from tests.support.nf4 import linear_4bit
from tests.support.oracle import make_problem
from tests.support.twin_problems import factors_of, norm_scale_of

BF16, FP32 = torch.bfloat16, torch.float32
DITHERED = Rounding("dithered", 7)


@pytest.fixture
def problem():
    return make_problem(5, 24, 48, 3, BF16, FP32)


def memory_for_norms(problem):
    return NormScale(*(torch.zeros_like(part) for part in norm_scale_of(problem)))


def norm_and_A(p):
    return "weight_norm", (*factors_of(p), p.scaling), {"A_dtype": BF16, "rounding": DITHERED}


def norm_into(p):
    written = {"into": memory_for_norms(p), "A_into": torch.zeros_like(p.lora_A, dtype=BF16)}
    return "weight_norm", (*factors_of(p), p.scaling), {"A_dtype": BF16, "rounding": DITHERED} | written


def norm_of_nf4(p):
    torch.manual_seed(0)
    weight = weight_of(linear_4bit(torch.randn(24, 48)))
    return "weight_norm", (weight, *factors_of(p)[1:], p.scaling), {}


def merge_of_int4(p):
    torch.manual_seed(0)
    weight = weight_of(linear_awq(24, 64, 32)[0])
    factors = factors_of(make_problem(1, 24, 64, 3, weight.dtype, FP32))[1:]
    return "merge", (weight, *factors, p.scaling), {"dtype": weight.dtype, "rounding": DITHERED}


def merge_given(p):
    given = {"norm_scale": norm_scale_of(p), "out": torch.zeros_like(p.weight)}
    return "merge", (*factors_of(p), p.scaling), {"dtype": BF16, "rounding": DITHERED} | given


def rescale(p, in_place):
    z, h = torch.randn(5, 24).to(BF16), torch.randn(5, 3).to(BF16)
    arguments = (z, h, p.lora_B, norm_scale_of(p).scale, torch.randn(24), p.scaling)
    return "rescale_fwd", arguments, {"in_place": in_place, "rounding": DITHERED}


def gradients(p, dtype=BF16, needs_base=False):
    saved, h = torch.randn(5, 24).to(dtype), torch.randn(5, p.lora_A.shape[0]).to(dtype)
    options = {"magnitude_dtype": FP32, "B_dtype": FP32, "bias_dtype": None, "needs_base": needs_base}
    written = {"B_into": torch.zeros_like(p.lora_B, dtype=dtype)}
    arguments = (p.grad_y.to(dtype), saved, h, p.lora_B, norm_scale_of(p), p.scaling)
    return "rescale_bwd", arguments, options | written | {"saved_is": "base", "rounding": DITHERED}


def stacked(p):
    layers = [Adapted(*factors_of(p), p.scaling, DITHERED) for _ in range(2)]
    return "stacked_merge", (layers,), {"dtype": BF16}


def glu(p):
    gate, up, h = (torch.randn(5, size).to(BF16) for size in (24, 24, 6))
    scale = torch.cat([norm_scale_of(p).scale] * 2)
    return "glu_fwd", (gate, up, GluFactors(h, (p.lora_B, p.lora_B), scale, p.scaling), None), {"activation": "silu"}


CALLS = {
    "norm and A": norm_and_A,
    "norm into memory": norm_into,
    "NF4": norm_of_nf4,
    "int4": merge_of_int4,
    "merge of a given norm": merge_given,
    "in place": lambda p: rescale(p, True),
    "not in place": lambda p: rescale(p, False),
    "gradients": gradients,
    "and of the base": lambda p: gradients(p, needs_base=True),
    "stacked": stacked,
    "gated MLP": glu,
    "decode": lambda p: ("decode", (weight_of(linear_4bit(torch.randn(24, 48))), BF16), {}),
    "cast": lambda p: ("scaled_cast", (p.lora_A, BF16), {"rounding": DITHERED}),
}


def leaves(value):
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in leaves(part)]
    return [value]


def same(left, right):
    return left is right is None or torch.equal(left, right)


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_it_gives_what_the_launcher_gives(make, problem):
    """And writes over what the launcher writes over."""
    torch.manual_seed(1)
    name, arguments, options = make(problem)
    torch.manual_seed(1)
    _, own_arguments, own_options = make(problem)
    found, expected = (
        getattr(custom_operator, name)(*arguments, **options),
        getattr(kernels, name)(*own_arguments, **own_options),
    )
    assert all(map(same, leaves(found), leaves(expected))), name
    tensors = [
        [value for value in leaves([*args, *opts.values()]) if isinstance(value, torch.Tensor)]
        for args, opts in ((arguments, options), (own_arguments, own_options))
    ]
    assert all(map(same, *tensors)), "what was written over"


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_what_pytorch_asks_of_an_operator(make, problem, monkeypatch):
    """Its schema tells the truth of what is written over, its shapes and strides are those of the outputs."""
    name, arguments, options = make(problem)
    calls, call = [], custom_operator.call

    def noted(*args):
        calls.append(args)
        return [torch.empty(custom_operator.NOTHING)] * 4

    monkeypatch.setattr(custom_operator, "call", noted)
    getattr(custom_operator, name)(*arguments, **options)
    (args,) = calls
    torch.library.opcheck(call, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_autocast_does_not_reach_inside():
    """At a rank whose product is PyTorch's."""
    _, arguments, options = gradients(make_problem(5, 24, 48, 200), FP32)
    expected = custom_operator.rescale_bwd(*arguments, **options)
    with torch.autocast("cpu", dtype=BF16):
        found = custom_operator.rescale_bwd(*arguments, **options)
    assert all(map(same, found, expected))
