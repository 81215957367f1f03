"""Versions, devices, what would run on each and why, a self-test of it, and what to do where something is missing.

The self-test runs `dora_linear` forward and backward in every form and type and holds it to fp64: W' written out, the
norm detached, PyTorch's own derivatives. It takes some ten seconds, on a GPU without compiled kernels some more.
"""

import math
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import torch

from .ops import dispatch
from .ops.dora_linear import dora_linear
from .ops.gpus import MIN_CAPABILITY
from .versions import require

LIBRARIES = {
    "torch": ("2.11", "always"),
    "transformers": ("5.17", "always"),
    "triton": ("3.6", "for the kernels; without it the PyTorch reference runs"),
    "peft": ("0.21", "for patch_peft"),
    "bitsandbytes": ("0.50", "for 4-bit weights"),
}
"""By name: the oldest version, and what needs it."""

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}
UNITS = {torch.float32: 1024.0, torch.float16: 16.0, torch.bfloat16: 16.0}
"""Units of roundoff that ‖found − exact‖ / ‖exact‖ may reach. Some six tensors are rounded to 16 bits. In fp32 sums run
over thousands of products, whose accumulators tensor cores may truncate; plain tf32 is off by 8000 units."""
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SCALING = 2.0


class Form(NamedTuple):
    """One way to run a layer: where, by which implementation, in which form, in which types of base and adapter."""

    device: torch.device
    impl: str
    space: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    bias: bool = False

    def __str__(self) -> str:
        types = f"{DTYPE_NAMES[self.dtype]} base, {DTYPE_NAMES[self.adapter_dtype]} adapter"
        return f"{self.device}, {self.impl}, {self.space} space, {types}{', bias' if self.bias else ''}"


class Sizes(NamedTuple):
    """M tokens, N out_features, K in_features, R rank."""

    tokens: int = 130
    out_features: int = 320
    in_features: int = 448
    rank: int = 16


SMALL = Sizes()


class Check(NamedTuple):
    """What the self-test found of one form: the largest relative error, what is allowed, and what is wrong, or None."""

    form: Form
    error: float
    allowed: float
    failure: str | None

    def __str__(self) -> str:
        return f"{self.form}: {self.failure or f'correct, error {self.error:.1e} of {self.allowed:.1e}'}"


def main() -> int:
    """Prints the findings; 1 where the self-test failed, else 0."""
    print(f"dora_kernels {version('dora-kernels') or '(not installed)'}, Python {platform.python_version()}")
    print("\n".join(["", "Versions", *map(_indented, versions())]))
    found = devices()
    print("\n".join(["", "Devices, and what runs there", *(_indented(described(device)) for device in found)]))
    print("\nSelf-test: forward and backward against fp64", flush=True)
    failed = 0
    for device in found:
        for form in forms(device):
            result = check(form)
            failed += result.failure is not None
            print(_indented(str(result)), flush=True)
    if advice := list(remedies(found)):
        print("\n".join(["", "What to do", *map(_indented, advice)]))
    print(f"\n{failed} of the self-test's forms failed" if failed else "\nThe self-test passed")
    return int(failed > 0)


def versions() -> Iterator[str]:
    """A line per library: found, needed, and for what."""
    for name, (oldest, purpose) in LIBRARIES.items():
        yield f"{name:<14}{version(name) or 'not installed':<16}{oldest} or newer, {purpose}"


def devices() -> list[torch.device]:
    """The CPU, and every GPU that PyTorch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def described(device: torch.device) -> str:
    """The device, the implementation that runs there, and why."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        what = f"{device} {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.1f} GiB"
    else:
        what = f"{device} {platform.machine()}, {torch.get_num_threads()} threads"
    return f"{what}: {dispatch.choose_impl(device)[1]}"


def forms(device: torch.device) -> Iterator[Form]:
    """What the self-test runs on a device: every form and type of the implementation that would be chosen there."""
    impl = dispatch.choose_impl(device)[0]
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    types = [(fp32, fp32), (bf16, fp32), (bf16, bf16), *([(fp16, fp32)] if device.type == "cuda" else [])]
    for dtype, adapter_dtype in types:
        # Training in fp16 runs in token space only.
        for space in ("token", "weight") if dtype != fp16 else ("token",):
            yield Form(device, impl, space, dtype, adapter_dtype, bias=space == "token")


def check(form: Form, sizes: Sizes = SMALL) -> Check:
    """Runs one form on random values; an error that is raised is what is wrong."""
    allowed = UNITS[form.dtype] * UNIT_ROUNDOFF[form.dtype]
    try:
        errors = compare(form, sizes)
    except Exception as error:  # Whatever a driver, a compiler or a library raises: the user wants to see it.
        return Check(form, math.inf, allowed, f"raised {type(error).__name__}: {error}")
    worst = max(errors.values(), key=lambda value: math.inf if math.isnan(value) else value)
    # Not `value > allowed`: NaN is a failure.
    wrong = [f"{name} {value:.1e}" for name, value in errors.items() if not value <= allowed]
    return Check(form, worst, allowed, f"wrong: {', '.join(wrong)}, allowed {allowed:.1e}" if wrong else None)


def compare(form: Form, sizes: Sizes) -> dict[str, float]:
    """The relative error of the output and of each gradient, by name."""
    generator = torch.Generator().manual_seed(0)
    M, N, K, R = sizes

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = form.dtype) -> torch.Tensor:
        # On the CPU: the same values everywhere. Rounded, so that fp64 begins from the same.
        return (torch.randn(*shape, generator=generator) * scale).to(form.dtype).to(dtype)

    weight = normal(N, K, scale=0.05)
    leaves = {
        "dx": normal(M, K),
        "dA": normal(R, K, dtype=form.adapter_dtype),
        "dB": normal(N, R, scale=0.05 * 0.3 / SCALING / R**0.5, dtype=form.adapter_dtype),
        "dm": (weight.float().norm(dim=1) * (1 + 0.1 * torch.randn(N, generator=generator))).to(form.adapter_dtype),
    }
    if form.bias:
        leaves["db"] = normal(N)
    grad_y = normal(M, N)
    exact = _exact(weight, {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}, grad_y.double())
    here = {name: leaf.to(form.device).requires_grad_() for name, leaf in leaves.items()}
    y = dora_linear(
        here["dx"], weight.to(form.device), here["dA"], here["dB"], here["dm"], scaling=SCALING,
        bias=here.get("db"), space=form.space, impl=form.impl,
    )  # fmt: skip
    found = dict(zip(exact, (y, *torch.autograd.grad(y, list(here.values()), grad_y.to(form.device)))))
    return {name: _relative(found[name], truth) for name, truth in exact.items()}


def _exact(weight: torch.Tensor, leaves: dict[str, torch.Tensor], grad_y: torch.Tensor) -> dict[str, torch.Tensor]:
    adapted = weight.double() + SCALING * leaves["dB"] @ leaves["dA"]
    merged = (leaves["dm"] / adapted.norm(dim=1).detach())[:, None] * adapted
    y = leaves["dx"] @ merged.T + leaves.get("db", 0.0)
    return dict(zip(["y", *leaves], (y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad_y))))


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.detach().double().cpu() - exact).norm() / exact.norm()).item()


def remedies(found: list[torch.device]) -> Iterator[str]:
    """What to do about each thing that is missing, old, or keeps the kernels from running."""
    for name, (oldest, purpose) in LIBRARIES.items():
        try:
            require(f"{name}>={oldest}")
        except (ImportError, metadata.PackageNotFoundError):
            yield f'{name} is {version(name) or "not installed"}, needed {purpose}: pip install "{name}>={oldest}"'
    if len(found) == 1:
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            yield "this PyTorch is built without CUDA: install one that has it, see https://pytorch.org/get-started"
        else:
            yield "PyTorch sees no GPU: where there is one, `nvidia-smi` must list it; without one the reference runs"
    for device in found[1:]:
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            yield f"{device} has compute capability {capability}, the kernels need {MIN_CAPABILITY}: the reference runs"
    if len(found) > 1 and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        yield "Triton needs a C compiler for its launcher, and there is no cc, gcc or clang: install one of them"
    if dispatch.kernels is not None and dispatch.kernels.interpreted() and len(found) > 1:
        yield "Triton interprets the kernels: unset TRITON_INTERPRET before Python starts"


def version(package: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _indented(line: str) -> str:
    return f"  {line}"
