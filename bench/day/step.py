"""One step of a day: what it costs, and what it runs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .worker import Day


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
    compiles: bool = True  # kernels that no step before has compiled

    def cost(self, day: "Day", known: dict, cold: float) -> str:
        """What is to come; `cold` seconds are for kernels that were not compiled ahead."""
        left = self.total(day) - known["cases"] if known["left"] is None else known["left"]
        each = self.seconds_a_case(known)
        source = "as measured" if known["cases"] else "assumed"
        compiling = f", and about {cold:.0f} s to compile kernels" if self.compiles and cold else ""
        return f"{left} cases of {each:.1f} s ({source}), about {left * each:.0f} s{compiling}"

    def seconds_a_case(self, known: dict) -> float:
        """As measured, else as assumed."""
        return known["seconds"] / known["cases"] if known["cases"] else self.each
