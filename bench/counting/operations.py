"""The engine's operations as a layer calls them, one by one: what `kernels` times."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dora_kernels.ops.types import GluFactors, NormScale, Rounding

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
    return {name: Work(*work) for name, work in (found | _of_a_gated_mlp(ops, p, norm, scale, base_out, h)).items()}


def beside(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Gate's tensor as another one, for up: backwards along `dim`."""
    return tensor.flip(dim)


def _of_a_gated_mlp(ops, p, norm, scale, base_out, h) -> dict[str, tuple]:
    """The layer is gate; up has its values in another order."""
    gate, up = base_out, beside(base_out, 1)
    norms, scales, hs = torch.cat([norm, beside(norm)]), torch.cat([scale, beside(scale)]), torch.cat([h, beside(h)], 1)
    factors = GluFactors(hs, (p.lora_B, beside(p.lora_B)), scales, ALPHA_OVER_RANK)
    # In 16 bits dm and dB are held to its rounding, which they have from act(gate) and from products' gradients.
    options = {"activation": "silu", "dtype": p.x.dtype, "roundings": (ROUNDED["rounding"],) * 2}

    def glu_bwd(space):
        a = p.grad_y.clone()  # which is written over
        return *ops.glu_bwd(a, gate, up, factors, None, norms, space=space, **options), a

    adapters = hs, *factors.lora_B, scales
    return {
        "glu_fwd, token space": (
            lambda: ops.glu_fwd(gate, up, factors, None, activation="silu"), (gate, up, *adapters),
        ),
        "glu_fwd, weight space": (lambda: ops.glu_fwd(gate, up, None, None, activation="silu"), (gate, up)),
        "glu_bwd, token space": (lambda: glu_bwd("token"), (p.grad_y, gate, up, *adapters, norms)),
        "glu_bwd, weight space": (lambda: glu_bwd("weight"), (p.grad_y, gate, up, hs, scales, norms)),
    }  # fmt: skip
