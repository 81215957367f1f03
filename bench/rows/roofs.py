"""The table of roofs: what each kernel's instructions, L2 and products cost beside the time of its bytes, by GPU."""

from collections.abc import Iterable
from typing import NamedTuple

from ..counting.cases import Case
from ..counting.launches import SizedLaunch
from ..counting.roofs import Profile

COLUMNS = ("kernel", "space", "dtypes", "shape", "rank", "gpu", "per element", "pipe", "pipe/bytes", "L2/bytes")
COLUMNS += ("tensor/bytes", "resident", "waves", "in flight")
LAYOUT = "{:<14}{:<8}{:<11}{:<11}{:>4}  {:<6}{:>11}  {:<6}{:>10}{:>10}{:>13}{:>10}{:>8}{:>11}"
STREAMED = 1 << 20
"""Elements from which on a launch is about bandwidth; smaller ones take the time of a launch, whatever they do."""


class Row(NamedTuple):
    """One launch on one GPU."""

    case: Case
    launch: SizedLaunch
    gpu: str
    profile: Profile

    @property
    def name(self) -> tuple[str, ...]:
        """The first columns."""
        case = self.case
        base, _, adapter = case.dtypes.partition("/")
        base = next((name for name in ("nf4", "int4", "fp8") if getattr(case, name)), (case.fp4 or base).lower())
        dtypes = f"{base}/{adapter}"
        shape = f"{case.out_features}x{case.in_features}"
        return (self.launch.launch.name, case.space, dtypes, shape, str(case.rank), self.gpu)


def shown(case: Case, launch: SizedLaunch) -> bool:
    """Whether the table has a row for it. The layers of an MLP have theirs as layers."""
    return launch.elements >= STREAMED and (case.mlp is None or launch.launch.name.startswith("glu"))


def roofs_table(rows: Iterable[Row]) -> list[str]:
    """One line per kernel, case and GPU, of the launch with the most instructions."""
    worst: dict[tuple[str, ...], Profile] = {}
    for row in rows:
        if row.name not in worst or row.profile.instructions > worst[row.name].instructions:
            worst[row.name] = row.profile
    lines = [COLUMNS]
    for name, found in sorted(worst.items(), key=lambda item: (*item[0][:4], int(item[0][4]), item[0][5])):
        times, memory = found.seconds, found.seconds["memory"]
        ratios = (f"{times[roof] / memory:.2f}" for roof in (found.pipe, "L2", "tensor"))
        per_element, pipe_ratio, *others = f"{found.instructions:.1f}", *ratios
        limits = (str(found.resident), f"{found.waves:.2f}", f"{found.in_flight:.2f}")
        lines.append((*name, per_element, found.pipe, pipe_ratio, *others, *limits))
    return [LAYOUT.format(*line).rstrip() for line in lines]
