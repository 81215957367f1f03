"""One adapted linear layer in every form that competes: the frozen base, PEFT's LoRA and DoRA, ours.

All hold the same parameters, rounded so that each of them can represent them, and share one frozen weight.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import peft
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import dora_kernels as dk
from dora_kernels.layers.experts import DoraExperts

from ..measuring.shapes import Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALPHA_OVER_RANK = 2.0


class Problem(NamedTuple):
    """One layer's parameters, its input and the gradient that comes back."""

    x: torch.Tensor  # [M, K]
    weight: nn.Parameter  # [N, K], frozen
    bias: nn.Parameter | None  # [N], frozen
    lora_A: torch.Tensor  # [R, K] fp32
    lora_B: torch.Tensor  # [N, R] fp32
    magnitude: torch.Tensor  # [N] fp32
    grad_y: torch.Tensor  # [M, N]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]


class Entry(NamedTuple):
    """A contestant that is built: its module, its trained parameters by gradient name, and autocast's dtype if used."""

    module: nn.Module
    trained: dict[str, nn.Parameter]
    autocast: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if self.autocast is None:
            return self.module(x)
        with torch.autocast(x.device.type, self.autocast):
            return self.module(x)

    def solve(self, problem: Problem) -> dict[str, torch.Tensor]:
        """The output "y", several side by side, and every gradient by name."""
        y = self.forward(problem.x)
        whole = torch.cat(tree_leaves(y), -1).detach()
        return dict(zip(["y", "dx", *self.trained], (whole, *self.backward(y, problem))))

    def backward(self, y: torch.Tensor | tuple[torch.Tensor, ...], problem: Problem) -> tuple[torch.Tensor, ...]:
        """The gradients of x and of the trained parameters."""
        leaves = [problem.x, *self.trained.values()]
        return torch.autograd.grad(y, leaves, tree_map(lambda y, grad: grad.to(y.dtype), y, problem.grad_y))

    def phases(self, problem: Problem) -> Callable[[], Iterator[str]]:
        """For `timing.interleaved`."""

        def run():
            y = self.forward(problem.x)
            yield "forward"
            grads = self.backward(y, problem)
            yield "backward"
            return y, grads

        return run


class Contestant(NamedTuple):
    """`kind` is the mathematics it must match: "base", "lora" or "dora"."""

    kind: str
    build: Callable[[Problem], Entry]


def make_problem(
    shape: Shape, tokens: int, rank: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Problem:
    """Random data at the scales of a trained model: the update is a third of the weight, m within 10 % of its norm."""
    generator = torch.Generator(device).manual_seed(seed)
    N, K = shape.out_features, shape.in_features

    def normal(*size, scale=1.0):
        # Values that every contestant's dtype holds exactly: then one fp64 truth is everybody's.
        return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

    weight = nn.Parameter(normal(N, K, scale=0.05), requires_grad=False)
    magnitude = (torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32) * (1 + 0.1 * normal(N))).to(dtype)
    return Problem(
        x=normal(tokens, K).requires_grad_(),
        weight=weight,
        bias=nn.Parameter(normal(N), requires_grad=False) if shape.bias else None,
        lora_A=normal(rank, K).float(),
        lora_B=normal(N, rank, scale=0.05 * 0.3 / ALPHA_OVER_RANK / rank**0.5).float(),
        magnitude=magnitude.float(),
        grad_y=normal(tokens, N),
    )


def empty_problem(shape: Shape, tokens: int, rank: int, dtype: torch.dtype, device: str) -> Problem:
    """One without values, for counting."""

    def empty(*size, dtype=dtype, trained=False):
        return torch.empty(size, dtype=dtype, device=device, requires_grad=trained)

    N, K = shape.out_features, shape.in_features
    return Problem(
        empty(tokens, K, trained=True),
        nn.Parameter(empty(N, K), requires_grad=False),
        nn.Parameter(empty(N), requires_grad=False) if shape.bias else None,
        *(empty(*size, dtype=torch.float32) for size in ((rank, K), (N, rank), (N,))),
        grad_y=empty(tokens, N),
    )


def contestants(
    dtype: torch.dtype, device: torch.device, *, compiled: bool = False, reference: bool = True
) -> dict[str, Contestant]:
    """By name, in the order of the tables. In 16 bits an fp32 adapter runs under autocast, as Trainer does, or not.

    On a GPU `reference` adds our reference implementation, hundreds of small launches that take most of a run's time.
    """
    half, own = dtype != torch.float32, DTYPE_NAMES[dtype]
    settings = [("fp32, autocast", torch.float32, dtype), ("fp32", torch.float32, None), (own, dtype, None)]
    settings = settings if half else [("fp32", torch.float32, None)]
    found = {"frozen base": Contestant("base", _base)}
    for name, adapter, autocast in settings:
        found[f"PEFT LoRA {name}"] = Contestant("lora", _peft(adapter, autocast, dora=False))
    for name, adapter, autocast in settings:
        found[f"PEFT DoRA {name}"] = Contestant("dora", _peft(adapter, autocast, dora=True))
    found[f"PEFT DoRA {settings[0][0]}, patched"] = Contestant(
        "dora", _peft(settings[0][1], settings[0][2], dora=True, patched=True)
    )
    if why_no_axolotl() is None:
        for name, adapter in {"fp32": torch.float32, own: dtype}.items():
            found[f"Axolotl DoRA {name}"] = Contestant("dora", _axolotl(adapter))
    gpu = device.type == "cuda"
    implementations = ("triton", "reference") if gpu and reference else ("triton",) if gpu else ("reference",)
    found["ours fp32, auto"] = Contestant("dora", _ours(torch.float32, "auto", implementations[0]))
    for impl in implementations:
        for space in ("token", "weight"):
            if not (dtype == torch.float16 and space == "weight"):
                found[f"ours fp32, {space}, {impl}"] = Contestant("dora", _ours(torch.float32, space, impl))
    if half:
        found[f"ours {own}, auto, {implementations[0]}"] = Contestant("dora", _ours(dtype, "auto", implementations[0]))
    return compiled_contestants(found) if compiled else found


def compiled_contestants(field: dict[str, Contestant]) -> dict[str, Contestant]:
    """Each under `torch.compile`."""
    return {f"{name}, compiled": c._replace(build=_compiled(c.build)) for name, c in field.items()}


def left_out() -> list[str]:
    """Peers that are no row of their own here, with the reason."""
    # find_spec imports the parents of a dotted name; peft is imported above.
    fork = "" if importlib.util.find_spec("peft.tuners.lora.dora_fused") else "not "
    missing = why_no_axolotl()
    return [
        f"dorafactors: {fork}installed; it is a fork of peft: installed, the rows named PEFT are its own",
        *([] if missing is None else [f"axolotl: left out; {missing}"]),
    ]


def why_no_axolotl() -> str | None:
    """Why Axolotl's kernels cannot be imported; None if they can."""
    try:
        importlib.import_module("axolotl.kernels.lora").apply_lora_o  # noqa: B018
    except Exception as error:  # Whatever a library raises on import: it is a row less.
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
    return None


def patch(model: nn.Module) -> None:
    """`patch_peft`, which must fuse every layer: else the row would time PEFT under our name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = dk.patch_peft(model)
    if report.skipped:
        raise RuntimeError(
            f"patch_peft left {len(report.skipped)} layers to PEFT: {next(iter(report.skipped.values()))}"
        )


def linear_of(problem: Problem) -> nn.Linear:
    """The base's layer."""
    N, K = problem.weight.shape
    linear = nn.Linear(K, N, bias=problem.bias is not None, device="meta")
    linear.weight, linear.bias = problem.weight, problem.bias
    return linear


def _base(problem: Problem) -> Entry:
    return Entry(linear_of(problem), {})


def _ours(adapter_dtype: torch.dtype, space: str, impl: str) -> Callable[[Problem], Entry]:
    def build(problem: Problem) -> Entry:
        layer = dora_linear_of(problem, adapter_dtype, space, impl)
        return Entry(layer, filled(factors_of(layer), problem, adapter_dtype))

    return build


def dora_linear_of(problem: Problem, adapter_dtype: torch.dtype, space: str, impl: str) -> dk.DoraLinear:
    """Our layer with the problem's weight, and a fresh adapter."""
    return dk.DoraLinear(
        problem.weight, problem.bias, r=problem.rank, lora_alpha=ALPHA_OVER_RANK * problem.rank,
        space=space, impl=impl, adapter_dtype=adapter_dtype,
    )  # fmt: skip


def _peft(adapter_dtype, autocast, *, dora: bool, patched: bool = False) -> Callable[[Problem], Entry]:
    def build(problem: Problem) -> Entry:
        config = peft.LoraConfig(
            r=problem.rank,
            lora_alpha=ALPHA_OVER_RANK * problem.rank,
            target_modules=["linear"],
            use_dora=dora,
        )
        model = peft.get_peft_model(_OneLinear(linear_of(problem)), config, autocast_adapter_dtype=False)
        trained = filled(factors_of(model.base_model.model.linear), problem, adapter_dtype)
        if patched:
            patch(model)
        return Entry(model.base_model.model, trained, autocast)

    return build


def _axolotl(adapter_dtype) -> Callable[[Problem], Entry]:
    """PEFT's layer, run as Axolotl runs an attention's output projection."""

    def build(problem: Problem) -> Entry:
        entry = _peft(adapter_dtype, None, dora=True)(problem)
        return entry._replace(module=_OutputProjection(entry.module.linear))

    return build


def _compiled(build: Callable[[Problem], Entry]) -> Callable[[Problem], Entry]:
    def build_compiled(problem: Problem) -> Entry:
        entry = build(problem)
        return entry._replace(module=torch.compile(entry.module))

    return build_compiled


def factors_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of our layer, or of PEFT's, by the names of their gradients."""
    if isinstance(layer, dk.DoraLinear | DoraExperts):
        return {"dA": layer.lora_A, "dB": layer.lora_B, "dm": layer.magnitude}
    parts = {"dA": layer.lora_A, "dB": layer.lora_B, "dm": layer.lora_magnitude_vector}
    return {name: part["default"].weight for name, part in parts.items() if "default" in part}


def filled(trained: dict[str, nn.Parameter], problem: Problem, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Gives the parameters the problem's values, in `dtype`."""
    values = {"dA": problem.lora_A, "dB": problem.lora_B, "dm": problem.magnitude}
    for name, parameter in trained.items():
        parameter.data = values[name].to(dtype, copy=True)
    return trained


class _OneLinear(nn.Module):
    """The smallest model that PEFT adapts."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class _OutputProjection(nn.Module):
    """What Axolotl's `apply_lora_o` takes: a module with an `o_proj`, and rows of tokens."""

    def __init__(self, o_proj: nn.Module):
        super().__init__()
        self.o_proj = o_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from axolotl.kernels.lora import apply_lora_o

        # It keeps the norm until A or B change. In training they do at every step, here they never do.
        vars(self.o_proj.lora_magnitude_vector["default"].weight).pop("_dora_cache", None)
        return apply_lora_o(self, x[None])[0]
