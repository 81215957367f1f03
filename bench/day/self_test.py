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
from dora_kernels.ops.base_weights import Nf4Weight

from ..contestants.layer import ALPHA_OVER_RANK, DTYPE_NAMES, make_problem
from ..counting.operations import Work, operations
from ..gates import kernels as kernel_gate
from ..measuring.shapes import PRESETS, Preset, Shape, layer_shapes

COMMAND = "selftest"
TOKENS = 515  # odd: the last blocks are not full
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = ((BF16, FP32), (BF16, BF16), (FP32, FP32), (FP16, FP32))
"""(x and W, adapter): all of them at the first shape, the first at every shape."""


class Case(NamedTuple):
    """`form` is a form of the layer, or None for the kernels one by one, which may read a weight in 4 bits."""

    shape: Shape
    rank: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    form: doctor.Form | None = None
    nf4: bool = False

    def row(self) -> dict:
        """As results name it."""
        what = "kernels" if self.form is None else f"{self.form.space} space"
        types = f"{DTYPE_NAMES[self.dtype]}/{DTYPE_NAMES[self.adapter_dtype]}{', NF4' if self.nf4 else ''}"
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
    yield Case(shapes[0], first, *TYPES[0], nf4=True)
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
        packed, exact = random_nf4(*problem.weight.shape, device) if case.nf4 else (problem.weight, problem.weight)
        (norm, scale), _ = ops.weight_norm(packed, *factors, ALPHA_OVER_RANK)
        base_out, h = problem.x @ exact.to(case.dtype).T, problem.x @ problem.lora_A.to(case.dtype).T
        works = operations(ops, problem._replace(weight=packed), norm, scale, base_out, h)
        truths = kernel_gate.truths(problem._replace(weight=exact), norm, scale, base_out, h)
        if case.nf4:
            works["decode"] = Work(lambda: ops.decode(packed, case.dtype), ())
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


def random_nf4(N: int, K: int, device: torch.device) -> tuple[Nf4Weight, torch.Tensor]:
    """A weight of random codes whose statistics are quantised, too, and its values in fp64 by the format's formula."""
    generator = torch.Generator(device).manual_seed(0)
    blocks = -(-N * K // 64)

    def codes(count: int) -> torch.Tensor:
        return torch.randint(256, (count,), generator=generator, dtype=torch.uint8, device=device)

    def positive(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, device=device) + 0.5

    packed, absmax, code = codes(-(-N * K // 2)), codes(blocks), torch.linspace(-0.1, 0.1, 16, device=device)
    nested, nested_code, offset = positive(-(-blocks // 256)), positive(256), torch.tensor(0.4, device=device)
    weight = Nf4Weight(
        packed, absmax, code, nested, nested_code, offset, torch.Size((N, K)), torch.bfloat16, 64, 256, parity=False
    )
    largest = nested_code.double()[absmax.int()] * nested.double().repeat_interleave(256)[:blocks] + offset.double()
    nibbles = torch.stack([packed // 16, packed % 16], dim=1).flatten()[: N * K]
    values = code.double()[nibbles.int()] * largest.repeat_interleave(64)[: N * K]
    return weight, values.view(N, K)


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
