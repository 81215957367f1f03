"""`DoraLinear`: starts as the layer it came from, shares its parameters, trains all of its own, and can be copied."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from triton.runtime.interpreter import InterpretedFunction

import dora_kernels as dk
from tests.support.oracle import relative_error
from tests.tolerances import SAME_FP32

SPACES = pytest.mark.parametrize("space", ["token", "weight"])
IMPLS = pytest.mark.parametrize("impl", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
K, N = 40, 33


def make_base(kind, dtype=torch.float32, bias=True):
    base = nn.Linear(K, N, bias=bias) if kind == "linear" else Conv1D(N, K)
    nn.init.normal_(base.weight, std=0.1)
    if base.bias is not None:
        nn.init.normal_(base.bias)
    return base.to(dtype)


def make_layer(kind="linear", dtype=torch.float32, bias=True, trained=True, **options):
    layer = dk.DoraLinear.from_linear(make_base(kind, dtype, bias), **{"r": 3, "lora_alpha": 6} | options)
    if trained:
        with torch.no_grad():
            layer.lora_B.normal_(std=0.1)
            layer.magnitude.mul_(1 + 0.2 * torch.randn(N))
    return layer


@SPACES
@IMPLS
@DTYPES
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
def test_a_fresh_layer_is_an_exact_no_op(kind, dtype, impl, space, rounding):
    base = make_base(kind, dtype, bias=False) if kind == "linear" else make_base(kind, dtype)
    if base.bias is not None:
        nn.init.zeros_(base.bias)
    x = torch.randn(2, 5, K).to(dtype)
    layer = dk.DoraLinear.from_linear(base, r=3, lora_alpha=6, impl=impl, space=space, rounding=rounding).eval()
    with torch.no_grad():
        weight = base.weight if kind == "linear" else base.weight.T
        assert torch.equal(layer(x), nn.functional.linear(x, weight))


@SPACES
@IMPLS
@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
def test_of_a_fresh_layer_over_fp32_autocast_shows_the_dither_of_weight_space_alone(impl, space, rounding):
    base, x = make_base("linear", bias=False), torch.randn(5, K)
    layer = dk.DoraLinear.from_linear(base, r=3, lora_alpha=6, impl=impl, space=space, rounding=rounding)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), base(x)) == ((space, rounding) != ("weight", "dithered"))


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_the_base_parameters_are_shared_and_frozen(kind):
    base = make_base(kind)
    layer = dk.DoraLinear.from_linear(base, r=3, lora_alpha=6)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B", "magnitude"}
    assert set(base.state_dict()) <= set(layer.state_dict()), "the base model's keys stay"
    assert (layer.in_features, layer.out_features) == (K, N)


def test_adapters_are_fp32_over_a_16_bit_base():
    layer = make_layer(dtype=torch.bfloat16)
    assert {layer.lora_A.dtype, layer.lora_B.dtype, layer.magnitude.dtype} == {torch.float32}
    assert make_layer(adapter_dtype=torch.bfloat16, dtype=torch.bfloat16).lora_A.dtype == torch.bfloat16


def test_conv1d_is_the_transposed_linear():
    conv, linear = make_layer("Conv1D"), make_layer()
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        for name in ("bias", "lora_A", "lora_B", "magnitude"):
            getattr(linear, name).copy_(getattr(conv, name))
    x = torch.randn(5, K)
    for impl in ("triton", "reference"):
        conv.impl = linear.impl = impl
        assert torch.allclose(conv(x), linear(x), atol=SAME_FP32)


@SPACES
@IMPLS
@DTYPES
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_to_plain_computes_what_forward_does(kind, dtype, impl, space):
    layer = make_layer(kind, dtype, impl=impl, space=space, salt=5).eval()
    x = torch.randn(6, K).to(dtype)
    merged = layer.to_plain()
    assert type(merged) is (nn.Linear if kind == "linear" else Conv1D)
    with torch.no_grad():
        # The roundings of the two forms differ: one ulp of 2⁻⁸ in bf16, averaged over sums.
        bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
        assert relative_error(merged(x), layer(x)) < bound
    assert merged.bias is layer.bias


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer))}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_a_copy_computes_the_same_and_is_its_own(kind, duplicate):
    layer = make_layer(kind, torch.bfloat16, lora_dropout=0.1, dropout_mode="peft", use_rslora=True, salt=9).eval()
    twin, x = duplicate(layer), torch.randn(6, K).bfloat16()
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(twin(x), before)
        twin.magnitude.mul_(2)
        assert torch.equal(layer(x), before)
    assert repr(twin) == repr(layer)
    for name, parameter in twin.named_parameters():
        assert parameter.requires_grad == getattr(layer, name).requires_grad, name


def train(layer, steps=6):
    """The losses of a few steps towards a fixed target."""
    torch.manual_seed(1)
    x, target = torch.randn(16, K), torch.randn(16, N)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@SPACES
def test_the_magnitude_is_trained_and_matters(space):
    layer = make_layer(trained=False, space=space, impl="triton")
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    without_magnitude = copy.deepcopy(layer)
    without_magnitude.magnitude.requires_grad_(False)
    losses, losses_without = train(layer), train(without_magnitude)
    assert losses[0] == losses_without[0]
    assert losses[-1] < losses_without[-1] < losses[0], "what m learns is not learnt without it"
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in ("weight", "bias")), name
    assert torch.equal(without_magnitude.magnitude, before["magnitude"])


@SPACES
@IMPLS
def test_zero_rows_output_their_bias_and_train_without_nan(impl, space):
    layer = make_layer(trained=False, space=space, impl=impl)
    zero = torch.tensor([0, 17, 32])
    with torch.no_grad():
        layer.weight[zero] = 0
        layer.reset_adapter()
        assert torch.equal(layer(torch.randn(4, K))[:, zero], layer.bias[zero].expand(4, 3))
    losses = train(layer)
    assert losses[-1] < losses[0]
    for name, parameter in layer.named_parameters():
        assert parameter.isfinite().all(), name


@SPACES
def test_several_adapters_from_several_threads(space, monkeypatch):
    layers = [make_layer(impl="triton", salt=i, space=space) for i in range(4)]
    inputs = [torch.randn(9, K, requires_grad=True) for _ in layers]

    def run(layer, x):
        y = layer(x)
        return (y.detach(), *torch.autograd.grad(y.sin().sum(), (x, layer.lora_A, layer.lora_B, layer.magnitude)))

    sequential = [run(*pair) for pair in zip(layers, inputs)]
    # The interpreter keeps its position in the grid in a global, so kernels take turns; all threads then leave each
    # launch together, and are in the same launcher at the same time.
    lock, together, launch = threading.Lock(), threading.Barrier(len(layers), timeout=60), InterpretedFunction.run

    def take_turns(self, *args, **kwargs):
        with lock:
            launch(self, *args, **kwargs)
        together.wait()

    monkeypatch.setattr(InterpretedFunction, "run", take_turns)
    # A new thread starts with all cores, and PyTorch's products then sum in another order.
    with ThreadPoolExecutor(len(layers), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        threaded = list(pool.map(run, layers, inputs))
    for i, (expected, got) in enumerate(zip(sequential, threaded)):
        for name, a, b in zip(("y", "dx", "dA", "dB", "dm"), expected, got):
            assert torch.equal(a, b), f"{name} of layer {i}"


BAD = {
    "r_0": (lambda: make_layer(r=0), ValueError, "`r` should be a positive integer value but the value passed is 0"),
    "r_true": (lambda: make_layer(r=True), TypeError, "`r` should be a positive integer value but .* is True"),
    "not_linear": (
        lambda: dk.DoraLinear.from_linear(nn.Embedding(3, 4), r=1, lora_alpha=1),
        TypeError,
        "takes an nn.Linear or a transformers Conv1D, got Embedding",
    ),
    "weight_1d": (lambda: dk.DoraLinear(nn.Parameter(torch.ones(3)), r=1, lora_alpha=1), ValueError, r"shape \[3\]"),
}


@pytest.mark.parametrize(("make", "kind", "message"), BAD.values(), ids=BAD)
def test_errors(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 1.5), (True, 3.0)], ids=["lora", "rslora"])
def test_scaling(use_rslora, scaling):
    assert make_layer(r=4, lora_alpha=6, use_rslora=use_rslora).scaling == scaling


def test_made_on_the_meta_device_and_loaded():
    """As large models are: made without values, then given those of a checkpoint."""
    layer, x = make_layer().eval(), torch.randn(6, K)
    with torch.device("meta"):
        empty = dk.DoraLinear.from_linear(nn.Linear(K, N), r=3, lora_alpha=6).eval()
    with pytest.raises(ValueError, match="weight is on meta but x is on cpu"):
        empty(x)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
def test_a_trace_is_refused_until_the_layer_is_merged():
    model = dk.apply_dora(nn.Sequential(nn.Linear(8, 4)), dk.DoraConfig(r=2))
    x = torch.linspace(-1, 1, 16).reshape(2, 8)
    with pytest.raises(RuntimeError, match="cannot record a DoRA layer: merge_dora the model first"):
        torch.jit.trace(model, x)
    y = model(x)
    traced = torch.jit.trace(dk.merge_dora(model), x)
    assert relative_error(traced(x), y) <= SAME_FP32


def test_what_prints_a_layer_says_how_it_is_served():
    assert "merge_aware=True" in repr(make_layer("linear", torch.bfloat16, merge_aware=True))
    assert "merge_aware" not in repr(make_layer("linear", torch.bfloat16))
