"""Holds every kernel, form and type to fp64 at real sizes, and names the first launch that is wrong."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from dora_kernels import doctor
from dora_kernels.ops import dispatch

from ..contestants.layer import ALPHA_OVER_RANK, DTYPE_NAMES, make_problem
from ..counting.operations import Work, operations
from ..gates import kernels as kernel_gate
from ..measuring.shapes import PRESETS, Preset, Shape, layer_shapes
from .packed_weights import FORMATS

COMMAND = "selftest"
TOKENS = 515  # odd: the last blocks are not full
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = ((BF16, FP32), (BF16, BF16), (FP32, FP32), (FP16, FP32))
"""(x and W, adapter): all of them at the first shape, the first at every shape."""


class Case(NamedTuple):
    """`form` is a form of the layer, or None for the kernels one by one, whose weight may be `packed` in a format."""

    shape: Shape
    rank: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    form: doctor.Form | None = None
    packed: str = ""

    def row(self) -> dict:
        """As results name it."""
        what = "kernels" if self.form is None else f"{self.form.space} space"
        types = f"{DTYPE_NAMES[self.dtype]}/{DTYPE_NAMES[self.adapter_dtype]}{', ' * bool(self.packed)}{self.packed}"
        sizes = {"out": self.shape.out_features, "in": self.shape.in_features, "tokens": TOKENS, "rank": self.rank}
        return {"what": what, "types": types, **sizes}


def cases(preset: Preset, device: torch.device) -> Iterator[Case]:
    """The kernels of each type first, then the forms; the ranks' first, the others at the first shape alone."""
    shapes = [shape for shape in layer_shapes(preset.models[0]) if not preset.shapes or shape.name in preset.shapes]
    first, *other_ranks = preset.ranks
    problems = [(shapes[0], first, *types) for types in TYPES]
    problems += [(shape, first, *TYPES[0]) for shape in shapes[1:]]
    problems += [(shapes[0], rank, *TYPES[0]) for rank in other_ranks]
    for problem in problems:
        yield Case(*problem)
    for packed in FORMATS:
        yield Case(shapes[0], first, *TYPES[0], packed=packed)
    forms = list(doctor.forms(device))
    for shape, rank, *types in problems:
        for form in forms:
            if [form.dtype, form.adapter_dtype] == types:
                yield Case(shape, rank, *types, form)


def total(day) -> int:
    """How many cases there are."""
    return len(list(cases(PRESETS[day.preset], day.device)))


def run(session) -> None:
    """Checks every case of the session's preset."""
    for case in cases(session.preset, session.device):
        if session.skips(COMMAND, case.row()):
            continue
        results = session.measure(COMMAND, case.row(), lambda case=case: check(case, session.device))
        session.failed += any(row["failed"] for row in (results or {}).values())


def check(case: Case, device: torch.device) -> dict[str, dict]:
    """By operation or form: the errors, and what is wrong with the launch that did it."""
    if case.form is None:
        return check_kernels(case, device)
    with launches() as made:
        sizes = doctor.Sizes(TOKENS, case.shape.out_features, case.shape.in_features, case.rank)
        found = doctor.check(case.form, sizes)
    print(f"  {found}", flush=True)
    failed = found.failure and named(found.failure, made)
    return {str(case.form): {"errors": {"worst": found.error}, "failed": failed}}


def check_kernels(case: Case, device: torch.device) -> dict[str, dict]:
    """Every operation of the layer, one by one."""
    ops = dispatch.implementation("triton")
    with torch.no_grad():
        problem = make_problem(case.shape, TOKENS, case.rank, case.dtype, device)
        factors = [factor.to(case.adapter_dtype) for factor in problem[3:6]]
        problem = problem._replace(lora_A=factors[0], lora_B=factors[1], magnitude=factors[2])
        weight = exact = problem.weight
        if case.packed:
            weight, exact = FORMATS[case.packed](*weight.shape, device)
        (norm, scale), _ = ops.weight_norm(weight, *factors, ALPHA_OVER_RANK)
        base_out, h = problem.x @ exact.to(case.dtype).T, problem.x @ problem.lora_A.to(case.dtype).T
        works = operations(ops, problem._replace(weight=weight), norm, scale, base_out, h)
        truths = kernel_gate.truths(problem._replace(weight=exact), norm, scale, base_out, h)
        if case.packed:
            works["decode"] = Work(lambda: ops.decode(weight, case.dtype), ())
            truths["decode"] = lambda: (exact,)
        made: dict[str, deque] = {}

        def recorded(name: str, call: Callable):
            def run():
                with launches() as found:
                    made[name] = found
                    return call()

            return run

        errors, failed = kernel_gate.check({name: recorded(name, work.call) for name, work in works.items()}, truths)
    return {
        name: {
            "errors": errors.get(name),
            "failed": failed[name] and named(failed[name], made[name]) if name in failed else None,
        }
        for name in works
    }


def named(failure: str, made: deque) -> str:
    """The failure with the launches that made it."""
    text = f"{failure}; launched: {'; '.join(made) or 'nothing'}"
    print(f"  WRONG: {text}", flush=True)
    return text


@contextmanager
def launches(most: int = 8) -> Iterator[deque]:
    """Yields the last launches of Triton's kernels, one line for each: kernel, grid, tensors, numbers and options."""
    made: deque[str] = deque(maxlen=most)

    def noting(run):
        def noted(self, *args, grid, warmup=False, **options):
            shown = grid if isinstance(grid, tuple) else "computed"
            made.append(f"{self.fn.__name__}{shown} of {', '.join(map(_argument, args))}, {options}")
            return run(self, *args, grid=grid, warmup=warmup, **options)

        return noted

    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", noting(kind.run)))
        yield made


def _argument(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return str(value)
