"""Steps that measure the cases of a session, as the commands of `python -m bench` do."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..rows.session import Session
from . import rehearsal
from .folder import RESULTS
from .step import Done, Step

if TYPE_CHECKING:
    from .worker import Day


class DaySession(Session):
    """A session that says what is running, so that a process which dies with it is known by it."""

    def __init__(self, day: "Day", step: Step, seconds: float):
        self.day, self.step = day, step
        super().__init__(
            argparse.Namespace(
                preset=day.preset, device="cuda", threads=None, output=day.folder.path / RESULTS,
                commit=day.folder.state["commit"], minutes=seconds / 60, repetitions=None, again=False,
            )
        )  # fmt: skip
        self.assumed = 0.0 if day.rehearsed else step.seconds_a_case(day.folder.step(step.name))

    def measure(self, command, case, call):
        known = self.day.folder.step(self.step.name)
        self.day.folder.begin(self.step.name, command, case)
        if self.day.rehearsed:
            rehearsal.plan_faults(self.step.name, known["cases"] + 1)
        found = super().measure(command, case, call)
        known["cases"] += 1
        self.day.folder.end()
        return found


def session_step(measure: Callable[[Session], object]) -> Callable[["Day", Step, float], Done]:
    """What a step runs that measures the cases of a session."""

    def run(day: "Day", step: Step, seconds: float) -> Done:
        session = DaySession(day, step, seconds)
        measure(session)
        return Done(session.failed, session.left)

    return run
