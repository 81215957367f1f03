"""The constants that `dora_kernels/ops/gpus.py` has for a GPU, as a day's measurements would have them, as data.

WEIGHT_SPACE_FACTOR: the factor on weight space's predicted overhead with which `dispatch`'s choices lose least time,
over the cases in which both forms were timed. RANK_PER_BYTE: the rank at which an element of s·B·A takes as long as a
byte, the median over norm, merge and rescale at long ranks. SHORTEST_LAUNCH: elements of 2 bytes that move in the time
of the shortest launch. Nothing is changed: a person reads them and changes the file.
"""

import itertools
import json
import statistics
from collections.abc import Iterable
from typing import NamedTuple

import torch

from dora_kernels.ops import gpus
from dora_kernels.ops.overhead import layer_overhead
from dora_kernels.ops.problem import Problem

from .. import kernels, questions, roofs
from ..contestants.layer import DTYPES
from ..counting.gpus import by_bytes_and_flops
from ..counting.predicted import Limit
from ..rows.compare import seconds
from ..rows.records import groups, read_rows
from . import predicted
from .folder import RESULTS, THRESHOLDS, Folder
from .step import Done

LONG_RANK = 64  # from which the product takes the time, not the bytes
PRODUCTS = ("weight_norm", "merge", "rescale_fwd")
"""Operations that form s·B·A or its like."""


class Timed(NamedTuple):
    """One case: predicted overheads in elements, measured seconds of forward and backward, in each form."""

    predicted: dict[str, float]
    measured: dict[str, float]

    def loss(self, factor: float) -> float:
        """The share of time that the form chosen with this factor takes more than the other."""
        chosen = "weight" if factor * self.predicted["weight"] < self.predicted["token"] else "token"
        return self.measured[chosen] / min(self.measured.values()) - 1


def run(day, step, allowed_seconds: float) -> Done:
    """Writes what is proposed."""
    write(day.folder, by_bytes_and_flops)
    day.folder.step(step.name)["cases"] = 1
    # Until everything before has been measured there will be more to read.
    before = [name for name in ("roofs", "kernels", "questions") if not day.folder.step(name)["done"]]
    return Done(0, int(bool(before)))


def write(folder: Folder, limit: Limit) -> None:
    """Writes what the folder's results propose."""
    path = folder.path / RESULTS
    found = groups(read_rows([path])) if path.exists() else []
    proposal = propose(found, folder.state["device"], tuple(folder.state["capability"]), limit)
    folder.write(THRESHOLDS, json.dumps(proposal, indent=1) + "\n")


def propose(found: list[dict[str, dict]], device: str, capability: tuple[int, int], limit: Limit) -> dict:
    """By constant: its value today, the one proposed, and what it rests on; None where nothing was measured."""
    roofs_found = predicted.roofs_of(found, predicted.gpu_of(device, capability))
    compared = list(predicted.compare(found, roofs_found, limit))
    wrong = predicted.corrections(compared, roofs_found)
    return {
        "gpu": device,
        "capability": list(capability),
        "WEIGHT_SPACE_FACTOR": weight_space_factor(list(timed(found)), capability),
        "RANK_PER_BYTE": rank_per_byte(found),
        "SHORTEST_LAUNCH": shortest_launch(found),
        "roofs": {roof: correction._asdict() for roof, correction in wrong.items()},
    }


def timed(found: Iterable[dict[str, dict]]) -> Iterable[Timed]:
    """The cases in which both forms were timed."""
    for group in found:
        case = next(iter(group.values()))["case"]
        if case.get("question") != questions.FORMS:
            continue
        measured = {
            space: time
            for name, row in group.items()
            for space in ("token", "weight")
            if f"ours fp32, {space}" in name and (time := seconds(row))
        }
        if len(measured) == 2:
            yield Timed({space: overhead(case, space) for space in measured}, measured)


def overhead(case: dict, space: str) -> float:
    """As `dispatch.choose` predicts it for fp32 adapters, training."""
    dtype, device = DTYPES[case["dtype"]], torch.device("cuda")
    problem = Problem(case["tokens"], case["out"], case["in"], case["rank"], dtype, device, has_bias=case["bias"])
    return layer_overhead(space, problem, case["rank"] / (gpus.RANK_PER_BYTE * dtype.itemsize), gpus.SHORTEST_LAUNCH)


def weight_space_factor(cases: list[Timed], capability: tuple[int, int]) -> dict | None:
    """The factor that loses least; among equals the one nearest to today's."""
    if not cases:
        return None
    today = gpus.WEIGHT_SPACE_FACTOR.get(capability, 1.0)
    # Choices change where both forms are predicted alike.
    changes = sorted(case.predicted["token"] / case.predicted["weight"] for case in cases)
    between = [(a * b) ** 0.5 for a, b in itertools.pairwise(changes)]
    tried = [today, changes[0] / 1.1, *between, changes[-1] * 1.1]
    lost = {factor: statistics.mean(case.loss(factor) for case in cases) for factor in tried}
    best = min(tried, key=lambda factor: (round(lost[factor], 9), abs(factor - today)))
    return {"today": today, "proposed": best, "cases": len(cases), "loses_today": lost[today], "loses": lost[best]}


def rank_per_byte(found: Iterable[dict[str, dict]]) -> dict | None:
    """From the rates that products of fp32 factors reached at long ranks."""
    rates = []
    for group in found:
        first = next(iter(group.values()))
        if first["command"] != kernels.COMMAND or first["case"]["rank"] < LONG_RANK:
            continue
        copied = kernels.bandwidth(group.get(kernels.COPY))
        rates += [
            sum(group[name]["flops"].values()) / time / copied
            for name in PRODUCTS
            if copied and (time := seconds(group.get(name)))
        ]
    if not rates:
        return None
    # Two operations for each element and unit of rank.
    return {"today": gpus.RANK_PER_BYTE, "proposed": statistics.median(rates) / 2, "operations": len(rates)}


def shortest_launch(found: Iterable[dict[str, dict]]) -> dict | None:
    """From the measured launch and copy."""
    for group in found:
        launch, copied = seconds(group.get(roofs.LAUNCH)), kernels.bandwidth(group.get(kernels.COPY))
        if launch and copied:
            elements = launch / roofs.IN_A_ROW * copied / 2
            return {
                "today": gpus.SHORTEST_LAUNCH,
                "proposed": round(elements),
                "microseconds": launch / roofs.IN_A_ROW * 1e6,
            }
    return None
