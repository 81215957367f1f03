"""The steps of a day in their order."""

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .. import block, experts, kernels, layer, model, questions, roofs
from ..measuring.shapes import BREAK_EVEN, PRESETS, Preset
from . import compile_ahead, gpu_tests, self_test, thresholds
from .session import session_step
from .step import Step

if TYPE_CHECKING:
    from .worker import Day


def most_important_first(preset: Preset) -> Iterable[Preset]:
    """One preset for each number of tokens and rank, so that all shapes of the first are measured first."""
    for rank, tokens in itertools.product(preset.ranks, preset.tokens):
        yield preset._replace(tokens=(tokens,), ranks=(rank,))


def in_order(command) -> Callable:
    """Measures the presets of `most_important_first`."""

    def measure(session) -> None:
        for part in most_important_first(session.preset):
            session.preset = part
            command.run(session)

    return measure


def _questions(session) -> None:
    preset = session.preset
    tokens, ranks = BREAK_EVEN[session.day.preset]
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


STEPS = (
    Step("compile", "every kernel of the day, in as many processes as there are cores", 1.5,
         compile_ahead.total, compile_ahead.SECONDS, compile_ahead.run, compiles=False),
    Step("selftest", "each kernel, form and type against fp64, at real sizes", 2,
         self_test.total, 1.5, session_step(self_test.run)),
    Step("tests", "the GPU's tests, in the order of what they protect", 4.5, gpu_tests.total, 0.6, gpu_tests.run, 30),
    Step("roofs", "copies, products and the shortest launch", 0.5, lambda day: 1, 15, session_step(roofs.run),
         compiles=False),
    Step("kernels", "each kernel against its roofs", 3, _cases, 8, session_step(in_order(kernels))),
    Step("layer", "one layer against the frozen base and every mode of PEFT", 4, _cases, 12,
         session_step(in_order(layer))),
    Step("block", "a gated MLP, and q, k and v, alone: together and layer by layer", 1.5,
         lambda day: len(list(PRESETS[day.preset].blocks())), 20, session_step(in_order(block))),
    Step("experts", "a layer's fused experts, alone", 0.8,
         lambda day: len(list(PRESETS[day.preset].experts())), 20, session_step(in_order(experts))),
    Step("model", "a training step of the whole model against every mode of PEFT", 6,
         lambda day: len(PRESETS[day.preset].runs), 120, session_step(model.run), 120),
    Step("questions", "what dispatch and the design rest on", 3, _asked, 2, session_step(_questions)),
    Step("thresholds", "the constants of ops/gpus.py, as these measurements have them", 0.2,
         lambda day: 1, 5, thresholds.run, 2, compiles=False),
)  # fmt: skip
