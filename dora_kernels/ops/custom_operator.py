"""The kernels in a compiled graph: one operator, which no compiler looks into.

Inductor would write the source of each kernel anew, without the named tuples that it takes and without its launch
options. An operator it calls as it is: the launchers run as they do without a graph.

The functions have the names of `kernels`. Dynamo traces them: each notes its call as text, and tensors and numbers
beside. Tensors that are written over stand apart, as PyTorch asks of an operator.
"""

from collections.abc import Sequence
from functools import cache
from types import CodeType, ModuleType, SimpleNamespace

import torch

from . import expert_shapes, kernels, reference
from .base_weights import Fp4Weight, Fp8Weight, Int4Weight, Nf4Weight
from .base_weights.int4 import Int4Layout
from .types import Adapted, GluFactors, GluGradients, NormScale, Rounding

TUPLES = (Adapted, Fp4Weight, Fp8Weight, GluFactors, Int4Layout, Int4Weight, Nf4Weight, NormScale, Rounding)
SHAPES = SimpleNamespace(**vars(reference) | vars(expert_shapes))
"""The same functions where tensors have no values."""

NOTHING = (0, 0, 0, 0)
"""Of no byte, and of more dimensions than an output has."""

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
NAMES = {"torch": torch} | {kind.__name__: kind for kind in TUPLES}


@torch.library.custom_op("dora_kernels::call", mutates_args=("written",))
def call(
    text: str,
    tensors: Sequence[torch.Tensor],
    written: Sequence[torch.Tensor],
    integers: Sequence[int],
    floats: Sequence[float],
) -> Outputs:
    """What the function of `kernels` returns, flat. A tensor of the shape `NOTHING` stands for None, for what was
    given, and for the rest of four: what writes over its arguments may not return a list."""
    device = (*tensors, *written)[0].device
    # Graphs run on whatever device is current, under the caller's autocast.
    with torch.cuda.device(device if device.type == "cuda" else -1), torch.autocast(device.type, enabled=False):
        return _call(kernels, text, tensors, written, integers, floats)


@call.register_fake
def _(text, tensors, written, integers, floats):
    # Launchers return what is contiguous, the reference what PyTorch's operators give.
    outputs = _call(SHAPES, text, tensors, written, integers, floats)
    return tuple(torch.empty_like(value, memory_format=torch.contiguous_format) for value in outputs)


def _call(ops: ModuleType | SimpleNamespace, text: str, tensors, written, integers, floats) -> Outputs:
    # Python evaluates arguments from left to right, as they were noted.
    values = {name: iter(each).__next__ for name, each in zip("TWIF", (tensors, written, integers, floats))}
    found = eval(_code(text), {"ops": ops} | NAMES | values)
    given = {id(tensor) for tensor in (*tensors, *written)}
    outputs, empty = _flat(found), (*tensors, *written)[0].new_empty
    outputs += [None] * (4 - len(outputs))
    return tuple(empty(NOTHING) if value is None or id(value) in given else value for value in outputs)


@cache
def _code(text: str) -> CodeType:
    return compile(text, text, "eval")


def _flat(value) -> list[torch.Tensor | None]:
    if not isinstance(value, tuple):
        return [value]
    return [leaf for part in value for leaf in _flat(part)]


class _Noted:
    """The values of a call, in the order of its text."""

    def __init__(self):
        self.tensors, self.written, self.integers, self.floats = [], [], [], []

    def note(self, value, is_written: bool = False) -> str:
        """Notes a value, and returns the text that stands for it."""
        if isinstance(value, torch.Tensor):
            (self.written if is_written else self.tensors).append(value)
            return "W()" if is_written else "T()"
        if value is None or isinstance(value, bool):
            return f"{value}"
        if isinstance(value, str):
            return f"'{value}'"
        if isinstance(value, torch.dtype):
            return f"{value}"
        if isinstance(value, tuple | list):
            name = "" if type(value) in (tuple, list, torch.Size) else type(value).__name__
            return f"{name}({''.join([self.note(part, is_written) + ', ' for part in value])})"
        if isinstance(value, float):
            self.floats.append(value)
            return "F()"
        self.integers.append(value)
        return "I()"


def _called(
    name: str, first, *arguments, writes_first: bool = False, written: dict | None = None, **options
) -> list[torch.Tensor | None]:
    """The first four outputs, flat; None for what the function leaves out, and for what is written over."""
    noted = _Noted()
    parts = [noted.note(first, writes_first), *(noted.note(value) for value in arguments)]
    parts += [f"{key}={noted.note(value)}" for key, value in options.items()]
    parts += [f"{key}={noted.note(value, is_written=True)}" for key, value in (written or {}).items()]
    outputs = call(f"ops.{name}({', '.join(parts)})", noted.tensors, noted.written, noted.integers, noted.floats)
    return [None if value.dim() == len(NOTHING) else value for value in outputs]


def _onto(name: str, base_out: torch.Tensor, arguments: tuple, in_place: bool, options: dict) -> torch.Tensor:
    outputs = _called(name, base_out, *arguments, writes_first=in_place, in_place=in_place, **options)
    return base_out if outputs[0] is None else outputs[0]


def weight_norm(weight, lora_A, lora_B, magnitude, scaling, *, into=None, A_into=None, **options):
    """As `kernels.weight_norm`."""
    arguments, written = (weight, lora_A, lora_B, magnitude, scaling), {"into": into, "A_into": A_into}
    norm, scale, cast_A, _ = _called("weight_norm", *arguments, written=written, **options)
    return into or NormScale(norm, scale), cast_A if A_into is None else A_into


def merge(weight, lora_A, lora_B, magnitude, scaling, *, norm_scale=None, out=None, into=None, A_into=None, **options):
    """As `kernels.merge`."""
    arguments, written = (weight, lora_A, lora_B, magnitude, scaling), {"out": out, "into": into, "A_into": A_into}
    merged, norm, scale, _ = _called("merge", *arguments, norm_scale=norm_scale, written=written, **options)
    return merged if out is None else out, norm_scale or into or NormScale(norm, scale)


def stacked_norm(layers, *, into=None, A_into=None):
    """As `kernels.stacked_norm`."""
    norm, scale, *_ = _called("stacked_norm", layers, written={"into": into, "A_into": A_into})
    return into or NormScale(norm, scale)


def stacked_merge(layers, *, norm_scale=None, into=None, A_into=None, **options):
    """As `kernels.stacked_merge`."""
    written = {"into": into, "A_into": A_into}
    merged, norm, scale, _ = _called("stacked_merge", layers, norm_scale=norm_scale, written=written, **options)
    return merged, norm_scale or into or NormScale(norm, scale)


def rescale_fwd(base_out, *arguments, in_place, **options):
    """As `kernels.rescale_fwd`."""
    return _onto("rescale_fwd", base_out, arguments, in_place, options)


def rescale_bwd(*arguments, B_into=None, **options):
    """As `kernels.rescale_bwd`."""
    return tuple(_called("rescale_bwd", *arguments, written={"B_into": B_into}, **options))


def glu_fwd(*arguments, **options):
    """As `kernels.glu_fwd`."""
    return _called("glu_fwd", *arguments, **options)[0]


def glu_bwd(*arguments, **options):
    """As `kernels.glu_bwd`."""
    return GluGradients(*_called("glu_bwd", *arguments, **options))


def scaled_cast(*arguments, **options):
    """As `kernels.scaled_cast`."""
    return _called("scaled_cast", *arguments, **options)[0]


def decode(*arguments):
    """As `kernels.decode`."""
    return _called("decode", *arguments)[0]


def expert_norm(*arguments, **options):
    """As `kernels.expert_norm`."""
    return NormScale(*_called("expert_norm", *arguments, **options)[:2])


def expert_rescale_fwd(base_out, *arguments, in_place, **options):
    """As `kernels.expert_rescale_fwd`."""
    return _onto("expert_rescale_fwd", base_out, arguments, in_place, options)


def expert_rescale_bwd(*arguments, **options):
    """As `kernels.expert_rescale_bwd`."""
    return tuple(_called("expert_rescale_bwd", *arguments, **options)[:3])


def expert_glu_fwd(*arguments, **options):
    """As `kernels.expert_glu_fwd`."""
    return _called("expert_glu_fwd", *arguments, **options)[0]


def expert_glu_bwd(*arguments, **options):
    """As `kernels.expert_glu_bwd`."""
    return _called("expert_glu_bwd", *arguments, **options)[0]


def expert_wgrad(*arguments, **options):
    """As `kernels.expert_wgrad`."""
    return _called("expert_wgrad", *arguments, **options)[0]
