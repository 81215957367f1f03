"""A training step of a whole model, counted on fake tensors: every launch, and the peak memory beyond the weights.

Two and three decoder layers are counted. What the third adds, each further one adds: bytes, FLOPs and launches exactly.
So does memory, moment for moment; of the moments of a step the highest at full depth is taken.
"""

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import NamedTuple
from unittest import mock

import torch

import dora_kernels.models.apply

from ..contestants.model import Contestant, Trained, adapted, build_base
from ..measuring.shapes import Run
from .routing import spread_evenly
from .traffic import Operation, counting, fake_module

COUNTED = 2  # layers; and one more


class Step(NamedTuple):
    """The launches of each part of a step, and bytes: beyond the frozen weights at each stretch's peak, those, and what
    the forward leaves for the backward."""

    parts: dict[str, list[Operation]]
    peaks: tuple[int, ...]
    frozen: int
    saved: int


def count_step(run: Run, contestant: Contestant, dtype: torch.dtype, capability: tuple[int, int], layers: int) -> Step:
    """With `layers` decoder layers."""
    base = build_base(run._replace(layers=layers), dtype, torch.device("meta"))
    with ExitStack() as stack:
        # Without values a norm cannot be computed, and for counting it need not.
        stack.enter_context(mock.patch.object(dora_kernels.models.apply, "check_model", lambda model: None))
        if run.quantize == "nf4":
            from bitsandbytes.nn import Params4bit

            # PEFT copies a 4-bit layer to look at it, which has no way without values.
            stack.enter_context(mock.patch.object(Params4bit, "__deepcopy__", lambda self, memo: self))
        model = adapted(base, contestant.adapt, run.checkpointing)
    rows = run.batch * run.sequence * (run.sizes.num_experts_per_tok if run.is_mixture else 0)
    with counting(capability) as counter, spread_evenly(rows):
        ids = torch.empty(run.batch, run.sequence, dtype=torch.int64)
        fake_module(model)
        trained = Trained(model, ids, contestant.autocast, fused=True)
        frozen = counter.restart() - sum(parameter.nbytes for parameter in trained.parameters)
        trained.begin()
        counter.take()
        before, parts, held = counter.restart(), {}, {}
        for part in trained.step():
            parts[part], held[part] = counter.take(), counter.restart()
    peaks = tuple(max(o.held for o in stretch) - frozen for stretch in stretches(parts))
    return Step(parts, peaks, frozen, held["forward"] - before)


def stretches(parts: dict[str, list[Operation]]) -> list[list[Operation]]:
    """Of a step's launches: in each, memory is highest at a moment that has its like at every depth.

    That is so near an end of the layers, not between: while the backward frees activations and leaves gradients, what
    is held rises or falls from layer to layer, and is highest at the last layer or the first.
    """
    half = len(parts["backward"]) // 2
    found = [parts["forward"], parts["backward"][:half], parts["backward"][half:], parts.get("optimizer")]
    return [stretch for stretch in found if stretch]


def at_depth(counted, one_more, layers: int):
    """What `counted` with `COUNTED` layers and `one_more` with one more make with `layers`."""
    return counted + (layers - COUNTED) * (one_more - counted)


def seconds_by_roof(launches: Iterable[Operation], limit) -> Counter[str]:
    """Seconds of these launches, by the roof that limits each."""
    found: Counter[str] = Counter()
    for launch in launches:
        roof, seconds = limit(launch)
        found[roof] += seconds
    return found


def predict_step(run: Run, contestant: Contestant, dtype: torch.dtype, capability: tuple[int, int], limit) -> dict:
    """In the form of a measured result, with "frozen_bytes", the seconds under each roof, and what one decoder layer
    launches and saves. `limit` gives the roof and the seconds of one launch."""
    layers = run.layers or run.sizes.num_hidden_layers
    steps = [count_step(run, contestant, dtype, capability, COUNTED + more) for more in (0, 1)]
    limited = [{part: seconds_by_roof(made, limit) for part, made in step.parts.items()} for step in steps]
    times = {part: at_depth(*(step[part].total() for step in limited), layers) for part in steps[0].parts}
    times["total"] = sum(times.values())
    whole = [sum(step.values(), Counter()) for step in limited]
    return {
        "roofs": {roof: at_depth(*(step[roof] for step in whole), layers) for roof in whole[0]},
        "seconds": {part: {"median": time} for part, time in times.items()},
        "peak_bytes": max(at_depth(*pair, layers) for pair in zip(*(step.peaks for step in steps))),
        "frozen_bytes": at_depth(*(step.frozen for step in steps), layers),
        "layer": of_one_layer(*steps),
    }


def of_one_layer(counted: Step, one_more: Step) -> dict:
    """The launches by part, and the bytes kept from forward to backward, of each further decoder layer."""
    parts = ("forward", "backward")
    launches = {part: len(one_more.parts[part]) - len(counted.parts[part]) for part in parts}
    return {"launches": launches, "saved_bytes": one_more.saved - counted.saved}
