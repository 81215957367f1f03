"""Times a layer's fused experts alone, forward and backward, against the frozen base and PEFT's expert LoRA.

PEFT has no DoRA for them. Every contestant has the same parameters and is held to fp64 first, for the very shape that
is timed; one that fails is printed as failed. Tokens are spread evenly: how many an expert has stands in the row. Time
and memory are those of `layer`. `predict --tables experts` has the same for a GPU that is not here.
"""

import argparse
from collections import Counter

import torch

from . import layer
from .contestants.experts import contestants, counted, make_problem
from .contestants.layer import DTYPES
from .counting.gpus import Roofs, by_bytes_and_flops
from .counting.model_counts import seconds_by_roof
from .counting.routing import spread_evenly
from .counting.traffic import counting, fake_module
from .gates import experts as experts_gate
from .measuring.shapes import ExpertShape
from .measuring.timing import attempt
from .rows.compare import group_table
from .rows.session import Session
from .rows.session import add_arguments as add_session_arguments

COMMAND = "experts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_arguments(parser)


def main(args: argparse.Namespace) -> int:
    session = Session(args)
    run(session)
    return session.finish()


def run(session: Session) -> None:
    """Measures every case of the session's preset."""
    preset, device = session.preset, session.device
    dtype = DTYPES[preset.dtype]
    for case, *sizes in preset.experts():
        if session.skips(COMMAND, case):
            continue

        def measured(sizes=sizes):
            problem = make_problem(*sizes, dtype, device)
            return layer.measure(problem, contestants(dtype, device), session.repetitions, experts_gate)

        if results := session.measure(COMMAND, case, measured):
            print(group_table(results), flush=True)


def predict(shape: ExpertShape, tokens: int, rank: int, dtype: torch.dtype, roofs: Roofs) -> dict[str, dict]:
    """By contestant, in the form of a measured result, with how many launches there are as "block". All kernels are
    limited by bytes and FLOPs alone."""
    results = {}
    for name, build in counted(shape, rank, dtype).items():
        row, failure = attempt(lambda build=build: count(build, shape, tokens, dtype, roofs), who=name)
        results[name] = row if row else {"failed": failure}
    return results


def count(build, shape: ExpertShape, tokens: int, dtype: torch.dtype, roofs: Roofs) -> dict:
    """Of one contestant, its tokens spread evenly."""
    module = build()
    with counting(roofs.capability) as counter, spread_evenly(tokens * shape.chosen):
        fake_module(module)
        x = torch.empty(tokens, shape.hidden, dtype=dtype, requires_grad=True)
        chosen = torch.empty(tokens, shape.chosen, dtype=torch.int64)
        weights = torch.empty(tokens, shape.chosen, dtype=dtype)
        grad_y = torch.empty_like(x)
        counter.take()
        before, parts = counter.restart(), {}
        y = module(x, chosen, weights)
        parts["forward"] = counter.take()
        torch.autograd.backward(y, grad_y)
        parts["backward"] = counter.take()
        peak = counter.peak - before
    limited = {part: seconds_by_roof(made, lambda o: by_bytes_and_flops(o, roofs)) for part, made in parts.items()}
    times = {part: by_roof.total() for part, by_roof in limited.items()}
    times["total"] = sum(limited.values(), Counter()).total()
    return {
        "seconds": {part: {"median": time} for part, time in times.items()},
        "peak_bytes": peak,
        "block": {"launches": {part: len(made) for part, made in parts.items()}},
        "operations": parts,
    }
