"""Which form runs, on which implementation, and that the reason given is true."""

import itertools
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import dora_kernels as dk
from dora_kernels.layers.explain import explain
from dora_kernels.ops import dispatch
from dora_kernels.ops.overhead import experts_overhead

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LLAMA = {"qo_proj": (4096, 4096), "kv_proj": (1024, 4096), "gate_up_proj": (14336, 4096), "down_proj": (4096, 14336)}


def choose(tokens=64, out_features=48, in_features=80, dtype=torch.bfloat16, device=CPU, rank=16, **options):
    asked = {name: options.pop(name) for name in ("space", "impl") if name in options}
    return dispatch.choose(dispatch.Problem(tokens, out_features, in_features, rank, dtype, device, **options), **asked)


@pytest.fixture
def gpu(monkeypatch):
    """A capability that the test sets, as if a GPU were there."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    pretend((9, 0))
    return pretend


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("tokens", [0, 1, 10**6])
def test_a_forced_form_is_honoured_at_any_size(space, impl, tokens):
    plan = choose(tokens, space=space, impl=impl)
    assert (plan.space, plan.impl) == (space, impl)
    assert plan.reason == f"{space} space: asked for; {impl}: asked for"


@pytest.mark.parametrize("option", ["space", "impl"])
def test_unknown_names_are_refused(option):
    with pytest.raises(ValueError, match=rf'{option} must be "auto", .* got \'cuda\''):
        choose(**{option: "cuda"})


TOKEN_ONLY = {
    "fp16_training": ({"dtype": torch.float16}, "in fp16 the gradient of the magnitude underflows"),
    "dropout_lora": ({"dropout": "lora"}, "dropout needs"),
    "dropout_peft": ({"dropout": "peft"}, "dropout needs"),
}


@pytest.mark.parametrize(("options", "why"), TOKEN_ONLY.values(), ids=TOKEN_ONLY)
def test_what_only_token_space_can_run(options, why):
    plan = choose(tokens=10**6, **options)
    assert plan.space == "token"
    assert plan.reason.startswith(f"token space: {why}")
    assert choose(space="token", **options).space == "token"
    with pytest.raises(ValueError, match=f'space="weight" cannot run this call: {why}.*use space="token" or "auto"'):
        choose(space="weight", **options)


@pytest.mark.parametrize("options", [{"trains_magnitude": False}, {"trains": False, "trains_magnitude": False}])
def test_fp16_without_a_trained_magnitude_may_use_weight_space(options):
    assert choose(10**6, dtype=torch.float16, **options).space == "weight"


@pytest.mark.parametrize(
    ("experts", "shape", "chosen"),
    [(8, (28672, 4096), 2), (128, (1536, 2048), 8)],
    ids=["mixtral", "qwen3-30b-a3b"],
)
def test_experts_are_merged_where_each_has_many_tokens(experts, shape, chosen, gpu):
    overhead = experts_overhead(experts)
    problems = [dispatch.Problem(tokens * chosen, *shape, 16, torch.bfloat16, CUDA) for tokens in (1, 512, 8192, 65536)]
    found = [dispatch.choose(problem, overhead=overhead).space for problem in problems]
    assert found == ["token", "token", "token", "weight"]


def spaces(tokens, shape, **options):
    return [choose(count, *shape, device=CUDA, **options).space for count in tokens]


@pytest.mark.parametrize("rank", [16, 384], ids="r{}".format)
@pytest.mark.parametrize("shape", LLAMA.values(), ids=LLAMA)
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_the_form_changes_at_most_once_with_the_tokens(shape, trains, rank, gpu):
    chosen = spaces(range(1, 40000, 50), shape, trains=trains, rank=rank)
    # k and v are so small at r = 16 that launches count: weight space has one less in inference.
    always_weight = shape == LLAMA["kv_proj"] and rank == 16 and not trains
    assert (chosen[0], chosen[-1]) == ("weight" if always_weight else "token", "weight")
    assert sum(a != b for a, b in itertools.pairwise(chosen)) == (0 if always_weight else 1)


@pytest.mark.parametrize("shape", ["gate_up_proj", "down_proj"])
def test_the_forward_breaks_even_where_the_bytes_do(shape, gpu):
    N, K = LLAMA[shape]
    # N K + M K + 2 M N against N K + 2 N K
    even = 2 * N * K // (K + 2 * N)
    assert spaces([even, even + 1], (N, K), trains=False) == ["token", "weight"]


@pytest.mark.parametrize("shape", LLAMA.values(), ids=LLAMA)
def test_high_ranks_favour_the_form_with_fewer_products(shape, gpu):
    """Products with W: one in token space, three in weight space; of 16-bit factors half of the time."""
    tokens = range(1, 40000, 50)
    low, high, half = (
        spaces(tokens, shape, rank=rank, adapter_dtype=dtype).index("weight")
        for rank, dtype in ((16, torch.float32), (384, torch.float32), (64, torch.bfloat16))
    )
    assert high > low == half


def test_a_bias_that_keeps_the_product_costs_weight_space_a_pass(gpu):
    tokens = range(1, 20000, 50)
    plain, bias = (spaces(tokens, LLAMA["qo_proj"], has_bias=has_bias).index("weight") for has_bias in (False, True))
    frozen_magnitude = spaces(tokens, LLAMA["qo_proj"], has_bias=True, trains_magnitude=False).index("weight")
    assert bias > plain == frozen_magnitude


def test_measured_data_moves_the_change(gpu, monkeypatch):
    before = spaces(range(1, 20000, 50), LLAMA["qo_proj"]).index("weight")
    monkeypatch.setitem(dispatch.WEIGHT_SPACE_FACTOR, (9, 0), 1.3)
    assert spaces(range(1, 20000, 50), LLAMA["qo_proj"]).index("weight") > before
    gpu((8, 0))
    assert spaces(range(1, 20000, 50), LLAMA["qo_proj"]).index("weight") == before


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_a_supported_gpu_runs_the_kernels(capability, gpu):
    gpu(capability)
    plan = choose(device=CUDA)
    assert plan.impl == "triton"
    assert plan.reason.endswith("triton: a supported GPU")


def test_an_old_gpu_says_so(gpu):
    gpu((7, 5))
    plan = choose(device=CUDA)
    assert plan.impl == "reference"
    assert "compute capability (7, 5), the kernels need (8, 0)" in plan.reason
    with pytest.raises(ValueError, match=r'impl="triton" is not available.*\(7, 5\).*use impl="reference" or "auto"'):
        choose(device=CUDA, impl="triton")


def test_a_cpu_without_the_interpreter_says_so(monkeypatch):
    monkeypatch.setattr(dispatch.kernels, "interpreted", lambda: False)
    assert choose().reason.endswith("reference: the tensors are on cpu")
    with pytest.raises(ValueError, match=r'impl="triton" is not available: the tensors are on cpu; use impl='):
        choose(impl="triton")


def test_the_interpreter_runs_only_when_asked_for():
    assert choose().impl == "reference"
    assert "interpreter runs only when asked for" in choose().reason


def test_without_triton_the_reference_runs_and_says_so():
    code = """
import sys
sys.modules["triton"] = None  # what an import of it then raises is what a missing package raises
import torch
import dora_kernels as dk
from dora_kernels.layers.explain import explain
layer = dk.DoraLinear.from_linear(torch.nn.Linear(6, 5), r=2, lora_alpha=4)
layer(torch.ones(3, 6)).sum().backward()
assert layer.magnitude.grad.isfinite().all()
print(explain(layer, tokens=3))
layer.impl = "triton"
try:
    layer(torch.ones(3, 6))
except ValueError as error:
    print(error)
"""
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    explanation, error = run.stdout.splitlines()
    assert "reference: Triton cannot be imported" in explanation
    assert error.startswith('impl="triton" is not available: Triton cannot be imported')
    assert error.endswith('use impl="reference" or "auto"')


@pytest.fixture
def plans(monkeypatch):
    """The plans that calls of `dora_linear` used."""
    used, original = [], dispatch.choose

    def record(*args):
        used.append(original(*args))
        return used[-1]

    monkeypatch.setattr(dispatch, "choose", record)
    return used


LAYERS = {
    "plain": {},
    "bias": {"bias": True},
    "triton": {"impl": "triton"},
    "forced_weight": {"space": "weight", "bias": True},
    "fp16": {"dtype": torch.float16, "bias": True},
    "dropout": {"lora_dropout": 0.1},
    "peft_dropout": {"lora_dropout": 0.1, "dropout_mode": "peft"},
    "wide": {"in_features": 7, "out_features": 90},
}


# At 15 tokens these sizes are past break-even in training, but not in inference, nor with a bias.
@pytest.mark.parametrize("tokens", [0, 15, 64])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_what_is_explained_is_what_runs(options, mode, tokens, plans):
    sizes = {"in_features": 32, "out_features": 16, "bias": False, "dtype": torch.bfloat16}
    linear = torch.nn.Linear(**{name: options.get(name, default) for name, default in sizes.items()})
    layer = dk.DoraLinear.from_linear(
        linear, r=2, lora_alpha=4, **{name: value for name, value in options.items() if name not in sizes}
    )
    layer.train(mode == "train")
    (explanation,) = explain(layer, tokens=tokens)
    plans.clear()
    with torch.set_grad_enabled(mode == "train"):
        layer(torch.ones(tokens, layer.in_features, dtype=linear.weight.dtype))
    assert plans == [explanation.plan]
    assert plans[0].reason in str(explanation)


def test_a_frozen_magnitude_is_explained_too(plans):
    layer = dk.DoraLinear.from_linear(torch.nn.Linear(8, 8, dtype=torch.float16), r=2, lora_alpha=4).train()
    layer.magnitude.requires_grad_(False)
    (explanation,) = explain(layer, tokens=64)
    plans.clear()
    layer(torch.ones(64, 8, dtype=torch.float16))
    assert plans == [explanation.plan]


def test_the_tensors_gpu_becomes_the_current_one():
    context = dispatch.on_device_of(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 3)))
    assert isinstance(context, torch.cuda.device) and context.idx == 3
    with dispatch.on_device_of(torch.ones(1)):
        pass


def _train(layer, x):
    layer(x).sum().backward()


def _infer(layer, x):
    with torch.no_grad(), dk.frozen_adapters(layer.eval()):
        layer(x)


CALLS = {
    "training": _train,
    "frozen": _infer,
    "norm": lambda layer, x: layer.weight_norm(),
    "merging": lambda layer, x: layer.to_plain(),
}


@pytest.mark.parametrize("space", ["token", "weight"])
@pytest.mark.parametrize("act", CALLS.values(), ids=CALLS)
def test_every_kernel_is_launched_on_the_tensors_gpu(act, space, monkeypatch):
    """Triton launches on the current device, whatever its arguments' is: a launch outside of `on_device_of` would run
    on another GPU and read there."""
    inside, launches, launch = [], [], InterpretedFunction.run

    @contextmanager
    def on_device_of(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    def run(self, *args, **kwargs):
        launches.append(len(inside))
        return launch(self, *args, **kwargs)

    layer = dk.DoraLinear.from_linear(torch.nn.Linear(8, 6), r=2, lora_alpha=4, space=space, impl="triton")
    monkeypatch.setattr(dispatch, "on_device_of", on_device_of)
    monkeypatch.setattr(InterpretedFunction, "run", run)
    act(layer, torch.ones(3, 8, requires_grad=True))
    assert launches and all(launches)
