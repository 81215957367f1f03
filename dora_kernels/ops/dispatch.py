"""Which form of the layer runs, on which implementation, and why.

`choose` is the one place that decides. Its thresholds are the bytes each form moves beyond the frozen base's GEMMs, or
the product s·B·A where that takes longer, times a measured correction per GPU architecture.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch

from ..versions import require
from . import reference
from .base_weights import Packed, Weight, dense, is_packed, note_of, readable
from .gpus import HALF_PRODUCT_SPEEDUP, MIN_CAPABILITY, RANK_PER_BYTE, SHORTEST_LAUNCH, WEIGHT_SPACE_FACTOR
from .types import Rounding

try:
    require("triton>=3.6")
    from . import kernels
except ImportError as error:  # No Triton for this platform, or an old one: the reference runs, and says why.
    kernels, _IMPORT_ERROR = None, str(error)


class Plan(NamedTuple):
    """What runs for one call: `space` "token" or "weight", `impl` "triton" or "reference", and the reason for each."""

    space: str
    impl: str
    reason: str


def implementation(impl: str) -> ModuleType:
    """The module of operations behind `impl` "triton" or "reference": the same names, arguments and returns."""
    return kernels if impl == "triton" else reference


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """The tensor's GPU as the current one: Triton launches on the current device, whatever its arguments' is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


class Problem(NamedTuple):
    """What `choose` decides by: a call's sizes and dtypes, and what it computes beside the plain output."""

    tokens: int
    out_features: int
    in_features: int
    rank: int
    dtype: torch.dtype
    device: torch.device
    adapter_dtype: torch.dtype = torch.float32
    has_bias: bool = False
    dropout: str | None = None  # the mode, where dropout is active
    trains: bool = True
    trains_magnitude: bool = True
    is_packed: bool = False  # the weight is quantised, and the operations decode it


def problem_of(
    weight: Weight,
    lora_A: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    tokens: int,
    dtype: torch.dtype,
    dropout: str | None,
    trains: bool,
) -> Problem:
    """The problem of a call with these tensors, computed in `dtype`."""
    return Problem(
        tokens,
        *weight.shape,
        rank=lora_A.shape[0],
        dtype=dtype,
        device=weight.device,
        adapter_dtype=lora_A.dtype,
        has_bias=bias is not None,
        dropout=dropout,
        trains=trains,
        trains_magnitude=trains and magnitude.requires_grad,
        is_packed=is_packed(weight),
    )


def choose(problem: Problem, space: str = "auto", impl: str = "auto") -> Plan:
    """What runs, where `space` and `impl` are asked for.

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
    if space == "weight" and only_token:
        raise ValueError(f'space="weight" cannot run this call: {only_token}; use space="token" or "auto"')
    if space != "auto":
        return Plan(space, impl, f"{space} space: asked for; {impl_reason}")
    if only_token:
        return Plan("token", impl, f"token space: {only_token}; {impl_reason}")
    if problem.is_packed:
        return Plan("weight", impl, f"weight space: a 4-bit weight is written out once in either form; {impl_reason}")
    capability = _capability(problem.device)
    rank_per_byte = RANK_PER_BYTE * (HALF_PRODUCT_SPEEDUP if problem.adapter_dtype.itemsize == 2 else 1)
    token, weight = (
        overhead_elements(
            form,
            problem.tokens,
            problem.out_features,
            problem.in_features,
            trains=problem.trains,
            keeps_product=problem.has_bias and problem.trains_magnitude,
            product=problem.rank / (rank_per_byte * problem.dtype.itemsize),
            shortest=SHORTEST_LAUNCH if capability else 0,
        )
        for form in ("token", "weight")
    )
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
) -> torch.Tensor:
    """W' = g ⊙ (W + s B A) [N, K], in fp32, rounded once to `dtype`, or to the weight's."""
    with operations_for(weight, impl) as (ops, base):
        dtype = dtype or weight.dtype
        return ops.merge(base, lora_A, lora_B, magnitude, scaling, dtype=dtype, rounding=rounding)[0]


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


def overhead_elements(
    space: str,
    tokens: int,
    out_features: int,
    in_features: int,
    *,
    trains: bool,
    keeps_product: bool = False,
    product: float = 0.0,
    shortest: int = 0,
) -> float:
    """Elements read and written beyond the frozen base's GEMMs, forward and (if `trains`) backward, launch by launch.

    Where a launch also forms s·B·A or its like, it takes as long as `product` times the product's elements, if that is
    more; and `shortest` at least. Left out is what both forms do alike but for x and h, and what has no size but the
    rank's.
    """
    mn, mk, nk = tokens * out_features, tokens * in_features, out_features * in_features

    def launch(moved: int, products: int = 0) -> float:
        return max(moved, product * products, shortest)

    h, grad_h, grad_A, norm = launch(mk), launch(mn), launch(mk), launch(nk, nk)
    if space == "token":
        forward = norm + h + launch(2 * mn, mn)
        # dZ and dm from dy and y; dh A, which the base's GEMM reads and adds to.
        backward = launch(3 * mn) + grad_h + grad_A + launch(mk) + mk
    else:
        # A bias that is added after the product was saved costs one more pass over the output. h, for dB alone, is made
        # in the backward, of A in x's dtype.
        merge = launch(2 * nk, nk)
        forward = norm + merge + (launch(2 * mn) if keeps_product else 0)
        backward = launch(0) + h + launch(2 * mn) + grad_h + grad_A + merge
    return forward + (backward if trains else 0)


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
