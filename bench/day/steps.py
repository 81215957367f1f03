"""The steps of a day in their order: what each costs, and what it runs."""

import importlib.util
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from .. import kernels, layer, model, questions, roofs
from ..measuring.shapes import PRESETS, Preset
from . import compile_ahead, gpu_tests, self_test, thresholds

if TYPE_CHECKING:
    from .worker import Day

COMPILING = 1.5  # seconds a kernel, until they were counted
BREAK_EVEN = {"day": ((512, 2048, 4096, 8192), (16, 64, 384)), "rehearsal": ((8, 16), (4,))}
"""Tokens and ranks between which `dispatch` changes its mind."""


class Done(NamedTuple):
    """Cases of a step that failed as a whole now, and those that are left."""

    failed: int
    left: int


class Step(NamedTuple):
    """`minutes` are its share of the day, over all slices; `least` seconds are worth beginning it for.

    `total` is the number of its cases, `each` the seconds that one is assumed to take until one was measured.
    """

    name: str
    title: str
    minutes: float
    total: Callable[["Day"], int]
    each: float
    run: Callable[["Day", "Step", float], Done]
    least: float = 10.0

    def cost(self, day: "Day", known: dict) -> str:
        """What is to come, in seconds and kernels to compile."""
        left = self.total(day) - known["cases"] if known["left"] is None else known["left"]
        each = self.seconds_a_case(known)
        source = "as measured" if known["cases"] else "assumed"
        compiled = day.folder.step("compile")
        cold = compiled.get("left") if compiled["cases"] else self.total(day)
        compiling = "" if self.name in ("compile", "thresholds") else f", with {cold or 0} kernels or more to compile"
        return f"{left} cases of {each:.1f} s ({source}), about {left * each:.0f} s{compiling}"

    def seconds_a_case(self, known: dict) -> float:
        """As measured, else as assumed."""
        return known["seconds"] / known["cases"] if known["cases"] else self.each


def session_step(measure: Callable) -> Callable[["Day", Step, float], Done]:
    """A step that measures the cases of a session."""

    def run(day: "Day", step: Step, seconds: float) -> Done:
        from .worker import DaySession

        session = DaySession(day, step, seconds)
        if day.rehearsed:
            session.assumed = 0.0
        measure(session)
        return Done(session.failed, session.left)

    return run


def most_important_first(preset: Preset) -> Iterable[Preset]:
    """One preset for each number of tokens and rank, so that all shapes of the first are measured first."""
    for rank, tokens in itertools.product(preset.ranks, preset.tokens):
        yield preset._replace(tokens=(tokens,), ranks=(rank,))


def in_order(command) -> Callable:
    def measure(session) -> None:
        for part in most_important_first(session.preset):
            session.preset = part
            command.run(session)

    return measure


def _model(session) -> None:
    model.run(session)


def _questions(session) -> None:
    preset, name = session.preset, session.day.preset
    tokens, ranks = BREAK_EVEN[name]
    session.preset = preset._replace(tokens=tokens, ranks=ranks)
    questions.run(session, (questions.FORMS,))
    session.preset = preset._replace(tokens=preset.tokens[:1])
    questions.run(session, [name for name in questions.QUESTIONS if name != questions.FORMS])


def _cases(day: "Day") -> int:
    return len(list(PRESETS[day.preset].layers()))


def _asked(day: "Day") -> int:
    preset, (tokens, ranks) = PRESETS[day.preset], BREAK_EVEN[day.preset]
    shapes = _cases(day) // len(preset.tokens) // len(preset.ranks)
    return shapes * (len(tokens) * len(ranks) + len(preset.ranks) * (len(questions.QUESTIONS) - 1))


def _blocks() -> list[Step]:
    """`bench block`, where this tree has it."""
    if importlib.util.find_spec("bench.block") is None:
        return []
    block = importlib.import_module("bench.block")
    run = session_step(block.run)
    return [Step("block", "an MLP and a projection group against PEFT", 2, _cases, 15, run)]


STEPS = (
    Step("compile", "every kernel of the day, in as many processes as there are cores", 1.5,
         compile_ahead.total, COMPILING, compile_ahead.run),
    Step("selftest", "each kernel, form and type against fp64, at real sizes", 2,
         self_test.total, 1.5, session_step(self_test.run)),
    Step("tests", "the GPU's tests, in the order of what they protect", 4.5, gpu_tests.total, 0.6, gpu_tests.run, 30),
    Step("roofs", "copies, products and the shortest launch", 0.5, lambda day: 1, 15, session_step(roofs.run)),
    Step("kernels", "each kernel against its roofs", 3, _cases, 8, session_step(in_order(kernels))),
    Step("layer", "one layer against the frozen base and every mode of PEFT", 4, _cases, 12,
         session_step(in_order(layer))),
    *_blocks(),
    Step("model", "a training step of the whole model against every mode of PEFT", 6,
         lambda day: len(PRESETS[day.preset].runs), 120, session_step(_model), 120),
    Step("questions", "what dispatch and the design rest on", 3, _asked, 2, session_step(_questions)),
    Step("thresholds", "the constants of ops/gpus.py, as these measurements have them", 0.2,
         lambda day: 1, 5, thresholds.run, 2),
)  # fmt: skip
