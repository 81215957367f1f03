"""Which form of the layer runs, on which implementation, and why.

`choose` is the one place that decides. Its thresholds are what `overhead` counts of each form, times a measured
correction per GPU architecture.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch

from ..versions import require
from . import reference
from .base_weights import Packed, Weight, dense, note_of, readable
from .gpus import HALF_PRODUCT_SPEEDUP, MIN_CAPABILITY, RANK_PER_BYTE, SHORTEST_LAUNCH, WEIGHT_SPACE_FACTOR
from .overhead import Overhead, layer_overhead
from .problem import Problem
from .served import served_norm, served_weight, unquantised
from .types import Rounding

try:
    require("triton>=3.6")
    from . import custom_operator, kernels
except ImportError as error:  # No Triton for this platform, or an old one: the reference runs, and says why.
    kernels, _IMPORT_ERROR = None, str(error)


class Plan(NamedTuple):
    """What runs for one call: `space` "token" or "weight", `impl` "triton" or "reference", and the reason for each."""

    space: str
    impl: str
    reason: str


def implementation(impl: str) -> ModuleType:
    """The module of operations behind `impl` "triton" or "reference": the same names, arguments and returns."""
    if impl != "triton":
        return reference
    return custom_operator if torch.compiler.is_compiling() else kernels


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """The tensor's GPU as the current one: Triton launches on the current device, whatever its arguments' is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Nothing is cast inside. The meta device knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def choose(problem: Problem, space: str = "auto", impl: str = "auto", overhead: Overhead = layer_overhead) -> Plan:
    """What runs, where `space` and `impl` are asked for. `overhead` is what each form costs: a layer's, or a block's.

    Raises:
        ValueError: a `space` or `impl` that does not exist, or cannot run this call.
    """
    impl, impl_reason = choose_impl(problem.device, impl)
    if space not in ("auto", "token", "weight"):
        raise ValueError(f'space must be "auto", "token" or "weight", got {space!r}')
    only_token = None
    if problem.dropout is not None:
        only_token = "dropout needs x Wᵀ and x Aᵀ apart"
    elif problem.dtype == torch.float16 and problem.trains_magnitude:
        only_token = "in fp16 the gradient of the magnitude underflows unless x Wᵀ is kept"
    if problem.merge_aware:
        if only_token or space == "token":
            reason = only_token or 'space="token" was asked for'
            raise ValueError(f"merge_aware quantises the merged weight, and so needs weight space: {reason}")
        reason = "weight space: merge_aware quantises the merged weight as it will be served, in PyTorch"
        return Plan("weight", impl, f"{reason}; {impl_reason}")
    if space == "weight" and only_token:
        raise ValueError(f'space="weight" cannot run this call: {only_token}; use space="token" or "auto"')
    if space != "auto":
        return Plan(space, impl, f"{space} space: asked for; {impl_reason}")
    if only_token:
        return Plan("token", impl, f"token space: {only_token}; {impl_reason}")
    if problem.is_packed:
        return Plan("weight", impl, f"weight space: a packed weight is written out once in either form; {impl_reason}")
    capability = _capability(problem.device)
    rank_per_byte = RANK_PER_BYTE * (HALF_PRODUCT_SPEEDUP if problem.adapter_dtype.itemsize == 2 else 1)
    product = problem.rank / (rank_per_byte * problem.dtype.itemsize)
    shortest = SHORTEST_LAUNCH if capability else 0
    token, weight = (overhead(form, problem, product, shortest) for form in ("token", "weight"))
    weight *= WEIGHT_SPACE_FACTOR.get(capability, 1.0)
    space = "weight" if weight < token else "token"
    return Plan(space, impl, f"{space} space: predicted to take less time at this size and rank; {impl_reason}")


def explained(plan: Plan, weight: Weight) -> Plan:
    """The plan, its reason extended by what a reader should know of the weight."""
    note = note_of(weight)
    return plan if note is None else plan._replace(reason=f"{plan.reason}; {note}")


@contextmanager
def operations_for(weight: Weight, impl: str = "auto") -> Iterator[tuple[ModuleType, torch.Tensor | Packed]]:
    """Inside, without gradients and on the weight's GPU: the operations, and the weight as they read it."""
    ops = implementation(choose_impl(weight.device, impl)[0])
    base = readable(weight)
    with torch.no_grad(), on_device_of(base):
        yield ops, base


def dense_weight(weight: Weight, dtype: torch.dtype, impl: str = "auto") -> torch.Tensor:
    """W [N, K] as a matrix in `dtype`: a quantised weight decoded."""
    with operations_for(weight, impl) as (ops, base):
        return dense(base, dtype, ops)


def merged_weight(
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    *,
    dtype: torch.dtype | None,
    rounding: Rounding,
    impl: str = "auto",
    merge_aware: bool = False,
) -> torch.Tensor:
    """W' = g ⊙ (W + s B A) [N, K], in fp32, rounded once to `dtype`, or to the weight's; Q(W') with `merge_aware`."""
    with operations_for(weight, impl) as (ops, base):
        dtype = dtype or weight.dtype
        if merge_aware:
            return served_weight(ops, base, lora_A, lora_B, magnitude, scaling, dtype=dtype)[0]
        return ops.merge(base, lora_A, lora_B, magnitude, scaling, dtype=dtype, rounding=rounding)[0]


def unquantised_weight(
    weight: Weight, lora_A: torch.Tensor, lora_B: torch.Tensor, magnitude: torch.Tensor, scaling: float
) -> torch.Tensor:
    """W' [N, K] in fp32, as `merge_aware` and export quantise it."""
    with operations_for(weight) as (ops, base):
        norm_scale = served_norm(ops, base, lora_A, lora_B, magnitude, scaling)
        return unquantised(ops, base, lora_A, lora_B, norm_scale, scaling)


def choose_impl(device: torch.device, impl: str = "auto") -> tuple[str, str]:
    """The implementation for tensors on `device`, and the reason."""
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl must be "auto", "triton" or "reference", got {impl!r}')
    missing = _why_no_triton(device)
    if impl == "triton" and missing:
        raise ValueError(f'impl="triton" is not available: {missing}; use impl="reference" or "auto"')
    if impl != "auto":
        return impl, f"{impl}: asked for"
    if missing:
        return "reference", f"reference: {missing}"
    if device.type != "cuda":
        return "reference", "reference: Triton's interpreter runs only when asked for"
    return "triton", "triton: a supported GPU"


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _why_no_triton(device: torch.device) -> str | None:
    if kernels is None:
        return f"Triton cannot be imported ({_IMPORT_ERROR})"
    if device.type == "cuda":
        capability = _capability(device)
        if capability < MIN_CAPABILITY:
            return f"the GPU has compute capability {capability}, the kernels need {MIN_CAPABILITY} or newer"
        return None
    if device.type == "cpu" and kernels.interpreted():
        return None
    return f"the tensors are on {device.type}"
