"""Each launch as it was predicted, beside what the GPU's profile says; and the rates that would make them agree."""

import functools
import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .. import kernels, roofs
from ..contestants.layer import DTYPES
from ..counting.accounting import ACCOUNTS
from ..counting.gpus import CAPABILITIES, ROOFS, Roofs, by_bytes_and_flops
from ..counting.predicted import Limit
from ..counting.roofs import longest
from ..counting.traffic import Operation
from ..measuring.shapes import Shape
from ..rows.compare import title
from ..rows.tables import table

ALLOWED = 0.15
"""The share by which a measured launch may differ from its prediction before the day says which roof is off."""
NOTES = {
    longest: "Our kernels by four roofs: memory, L2, instructions, tensor cores",
    by_bytes_and_flops: "By bytes and FLOPs alone: `python -m bench day --report` takes four roofs, on any machine",
}
TRITON = {name.strip("_") for name in ACCOUNTS}


class Compared(NamedTuple):
    """One launch; `roof` is what the prediction takes its time from."""

    case: str
    operation: str
    launch: str
    predicted: float
    measured: float
    roof: str

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted

    @property
    def off(self) -> bool:
        """Whether the model is off by more than is allowed, either way."""
        return not 1 / (1 + ALLOWED) <= self.ratio <= 1 + ALLOWED


class Correction(NamedTuple):
    """Of one roof: what the model takes (a rate, or seconds a launch), and what the launches under it need."""

    assumed: float
    proposed: float
    ratio: float
    launches: int


def predict(operation: Operation, roofs: Roofs, limit: Limit) -> tuple[str, float]:
    """The name of the roof that limits a launch, and its seconds; tensor cores' with the format of the products."""
    roof, seconds = limit(operation, roofs)
    return f"{roof}, {operation.rate}" if roof == "tensor" else roof, seconds


def gpu_of(device: str, capability: tuple[int, int]) -> str:
    """The name of the GPU whose assumed roofs are nearest: by its name, else by its compute capability."""
    named = [gpu for gpu in ROOFS if gpu in device.lower()]
    return next(iter([*named, *(gpu for gpu, found in CAPABILITIES.items() if found == capability)]), "h200")


def roofs_of(groups: Iterable[dict[str, dict]], gpu: str) -> Roofs:
    """Those measured today, where they were, in place of what is assumed."""
    for group in groups:
        if next(iter(group.values()))["command"] == roofs.COMMAND:
            return roofs.measured_roofs(group, ROOFS[gpu])
    return ROOFS[gpu]


def compare(groups: Iterable[dict[str, dict]], found: Roofs, limit: Limit) -> Iterator[Compared]:
    """Every launch of `bench kernels` that was profiled."""
    for group in groups:
        first = next(iter(group.values()))
        if first["command"] != kernels.COMMAND or kernels.COPY not in group:
            continue
        case = first["case"]
        shape = (case["layer"], case["out"], case["in"], case["bias"])
        counted = _counted(shape, case["tokens"], case["rank"], case["dtype"], found.capability)
        name = title({key: case[key] for key in ("out", "in", "tokens", "rank")})
        for operation, launches in counted.items():
            profile = (group.get(operation, {}).get("profile") or {}).get("kernels") or []
            for launch, seconds in matched(launches, profile):
                roof, predicted = predict(launch, found, limit)
                yield Compared(name, operation, launch.name, predicted, seconds, roof)


@functools.cache
def _counted(
    shape: tuple, tokens: int, rank: int, dtype: str, capability: tuple[int, int]
) -> dict[str, list[Operation]]:
    counted = kernels.count(Shape(*shape), tokens, rank, DTYPES[dtype], capability)
    return {name: found.launches for name, found in counted.items()}


def matched(launches: list[Operation], profile: list[tuple[str, float]]) -> Iterator[tuple[Operation, float]]:
    """Launches and their profiled seconds: one by one where there are as many, else our own kernels' by name."""
    if len(launches) == len(profile):
        yield from ((launch, seconds) for launch, (_, seconds) in zip(launches, profile))
        return
    ours = [launch for launch in launches if launch.name in TRITON]
    measured = [(name.strip("_"), seconds) for name, seconds in profile if name.strip("_") in TRITON]
    if [launch.name for launch in ours] == [name for name, _ in measured]:
        yield from ((launch, seconds) for launch, (_, seconds) in zip(ours, measured))


def corrections(compared: Iterable[Compared], found: Roofs) -> dict[str, Correction]:
    """By roof, from the median over the launches that it limits; only of roofs that are off."""
    by_roof: dict[str, list[float]] = {}
    for one in compared:
        by_roof.setdefault(one.roof, []).append(one.ratio)
    assumed = {"memory": found.bandwidth, "L2": found.l2, "launch": found.launch}
    assumed |= {f"tensor, {rate}": value for rate, value in found.flops.items()}
    proposed = {}
    for roof, ratios in by_roof.items():
        ratio = statistics.median(ratios)
        if not 1 / (1 + ALLOWED) <= ratio <= 1 + ALLOWED:
            # Issue slots and pipes are results a clock: what can be wrong of them is the clock.
            rate = assumed.get(roof, found.clock)
            proposed[roof] = Correction(rate, rate * ratio if roof == "launch" else rate / ratio, ratio, len(ratios))
    return proposed


def section(compared: list[Compared], found: Roofs, limit: Limit) -> str:
    """Of the day's report: how many launches agree, each that does not, and the corrected rates."""
    if not compared:
        return "No launch was profiled yet."
    off = sorted((one for one in compared if one.off), key=lambda one: -abs(1 - one.ratio))
    lines = [
        f"{len(compared) - len(off)} of {len(compared)} launches are within {ALLOWED:.0%} of their prediction. "
        f"Roofs: {found.source}. {NOTES[limit]}."
    ]
    if off:
        rows = [
            (f"{one.operation}: {one.launch}", one.case, f"{one.predicted * 1e6:.1f}", f"{one.measured * 1e6:.1f}",
             f"{one.ratio:.2f}", one.roof)
            for one in off
        ]  # fmt: skip
        header = ("launch", "case", "predicted µs", "measured µs", "measured / predicted", "limiting roof")
        lines += ["", table(header, rows)]
    if wrong := corrections(compared, found):
        rows = [
            (roof, f"{c.assumed:.4g}", f"{c.proposed:.4g}", f"{c.ratio:.2f}", str(c.launches))
            for roof, c in wrong.items()
        ]
        lines += ["", table(("roof", "assumed", "proposed", "measured / predicted", "launches"), rows)]
    return "\n".join(lines)
