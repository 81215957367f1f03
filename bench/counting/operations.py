"""The engine's operations as a layer calls them, one by one: what `kernels` times."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dora_kernels.ops.types import NormScale, Rounding

from ..contestants.layer import ALPHA_OVER_RANK

ROUNDED = {"rounding": Rounding("dithered")}


class Work(NamedTuple):
    """One operation: its call, and the tensors that it reads."""

    call: Callable[[], object]
    tensors: tuple[torch.Tensor, ...]

    def bytes(self, returned: torch.Tensor | tuple[torch.Tensor | None, ...]) -> int:
        """Of all arguments and results, once each: what no implementation can do without."""
        returned = returned if isinstance(returned, tuple) else (returned,)
        # Results may be arguments handed through.
        return sum({id(t): t.nbytes for t in (*self.tensors, *returned) if t is not None}.values())


def operations(ops, problem, norm, scale, base_out, h) -> dict[str, Work]:
    """Each operation as the layer calls it, by name."""
    p, s, dtype = problem, ALPHA_OVER_RANK, problem.x.dtype
    factors = (p.weight, p.lora_A, p.lora_B)
    A_dtype = None if dtype == p.lora_A.dtype else dtype
    norm_scale = NormScale(norm, scale)
    after = {"magnitude_dtype": torch.float32, "B_dtype": torch.float32, "bias_dtype": None}

    def rescale_bwd(needs_base):
        options = {"saved_is": "output", "needs_base": needs_base, **after, **ROUNDED}
        return ops.rescale_bwd(p.grad_y, base_out, h, p.lora_B, norm_scale, s, **options)

    def weight_norm():
        found, cast_A = ops.weight_norm(*trained, s, A_dtype=A_dtype, **ROUNDED)
        return *found, cast_A

    def merge(magnitude, **options):
        merged, found = ops.merge(*factors, magnitude, s, dtype=dtype, **options, **ROUNDED)
        return merged, *found

    trained, backward = (*factors, p.magnitude), (p.grad_y, base_out, h, norm, scale)
    found = {
        "weight_norm": (weight_norm, trained),
        "merge": (lambda: merge(p.magnitude), trained),
        "merge, g given": (lambda: merge(None, norm_scale=norm_scale), (*factors, norm, scale)),
        "rescale_fwd": (
            lambda: ops.rescale_fwd(base_out, h, p.lora_B, scale, None, s, in_place=False, **ROUNDED),
            (base_out, h, p.lora_B, scale),
        ),
        "rescale_bwd, token space": (lambda: rescale_bwd(True), backward),
        "rescale_bwd, weight space": (lambda: rescale_bwd(False), backward),
        "scaled_cast of B": (
            lambda: ops.scaled_cast(p.lora_B, dtype, scale=scale, scaling=s, **ROUNDED), (p.lora_B, scale),
        ),
    }  # fmt: skip
    return {name: Work(*work) for name, work in found.items()}
