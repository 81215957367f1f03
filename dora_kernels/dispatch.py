"""Which form of the layer runs, on which implementation, and why.

`choose` is the one place that decides. Its thresholds are the bytes each form moves beyond the frozen base's GEMMs,
times a measured correction per GPU architecture.
"""

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch

from . import reference
from .versions import require

try:
    require("triton>=3.6")
    from . import kernels
except ImportError as error:  # No Triton for this platform, or an old one: the reference runs, and says why.
    kernels, _IMPORT_ERROR = None, str(error)

MIN_CAPABILITY = (8, 0)

WEIGHT_SPACE_FACTOR: dict[tuple[int, int], float] = {}
"""Per compute capability: measured time of the weight-space form over its predicted time, relative to the token-space
form's. Empty until measured: an architecture that is absent has 1.0, the prediction from bytes alone."""


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


def choose(
    *,
    tokens: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device,
    has_bias: bool = False,
    dropout: str | None = None,
    trains_magnitude: bool = True,
    trains: bool = True,
    nf4: bool = False,
    space: str = "auto",
    impl: str = "auto",
) -> Plan:
    """Chooses for a call with `tokens` rows; `dropout` is the active dropout's mode or None, `nf4` a packed weight.

    Raises:
        ValueError: a `space` or `impl` was asked for that does not exist, or cannot run this call.
    """
    impl, impl_reason = choose_impl(device, impl)
    if space not in ("auto", "token", "weight"):
        raise ValueError(f'space must be "auto", "token" or "weight", got {space!r}')
    only_token = None
    if dropout is not None:
        only_token = "dropout needs x Wᵀ and x Aᵀ apart"
    elif dtype == torch.float16 and trains_magnitude:
        only_token = "in fp16 the gradient of the magnitude underflows unless x Wᵀ is kept"
    if space == "weight" and only_token:
        raise ValueError(f'space="weight" cannot run this call: {only_token}; use space="token" or "auto"')
    if space != "auto":
        return Plan(space, impl, f"{space} space: asked for; {impl_reason}")
    if only_token:
        return Plan("token", impl, f"token space: {only_token}; {impl_reason}")
    if nf4:
        return Plan("weight", impl, f"weight space: a 4-bit weight is written out once in either form; {impl_reason}")
    sizes = (tokens, out_features, in_features)
    token, weight = (
        overhead_elements(form, *sizes, trains=trains, keeps_product=has_bias and trains_magnitude)
        for form in ("token", "weight")
    )
    weight *= WEIGHT_SPACE_FACTOR.get(_capability(device), 1.0)
    space = "weight" if weight < token else "token"
    return Plan(space, impl, f"{space} space: it moves less memory at this size; {impl_reason}")


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
    space: str, tokens: int, out_features: int, in_features: int, *, trains: bool, keeps_product: bool = False
) -> int:
    """Elements read and written beyond the frozen base's GEMMs, forward and (if `trains`) backward.

    Forward: the norm reads W in token space; in weight space the norm and the merge read it and W' is written and read.
    Ranks are small beside these sizes and left out.
    """
    mn, mk, nk = tokens * out_features, tokens * in_features, out_features * in_features
    if space == "token":
        forward, backward = nk + mk + 2 * mn, 4 * mn + 3 * mk
    else:
        # A bias that is added after the product was saved costs one more pass over the output.
        forward, backward = 2 * nk + mk + (2 * mn if keeps_product else 0), 2 * nk + 3 * mn + mk
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
