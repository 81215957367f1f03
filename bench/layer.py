"""Times one DoRA linear layer, forward and backward, against the frozen base, PEFT's LoRA and PEFT's DoRA.

Every contestant has the same parameters and is held to fp64 first, for the very shape that is timed; one that fails is
printed as failed. Repetitions are interleaved in one process; times are medians, ± half the distance between the
quartiles, "× LoRA" compares with PEFT's fastest LoRA. Memory is the peak beyond parameters and inputs, including the
gradients. `--preset full` runs every shape of three models; an interrupted run continues where it was.
"""

import argparse
from types import ModuleType

import torch
from torch.utils._pytree import tree_leaves

from .contestants.layer import DTYPES, Contestant, Problem, contestants, left_out, make_problem
from .gates import layer as layer_gate
from .gates.layer import errors
from .measuring.memory import peak_bytes
from .measuring.outputs import Outputs
from .measuring.profiler import profile
from .measuring.timing import attempt, interleaved, release
from .rows.compare import group_table
from .rows.session import Session
from .rows.session import add_arguments as add_session_arguments

COMMAND = "layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_arguments(parser)


def main(args: argparse.Namespace) -> int:
    session = Session(args)
    run(session)
    return session.finish()


def run(session: Session) -> None:
    """Measures every case of the session's preset."""
    preset, device = session.preset, session.device
    print("\n".join(left_out()))
    dtype = DTYPES[preset.dtype]
    for case, *sizes in preset.layers():
        if session.skips(COMMAND, case):
            continue

        def measured(sizes=sizes):
            problem = make_problem(*sizes, dtype, device)
            field = contestants(dtype, device, compiled=preset.compiled, reference=preset.reference)
            return measure(problem, field, session.repetitions)

        if results := session.measure(COMMAND, case, measured):
            print(group_table(results), flush=True)


def measure(
    problem: Problem, field: dict[str, Contestant], repetitions: int, gate: ModuleType = layer_gate
) -> dict[str, dict]:
    """By contestant: its error against fp64, and its times and peak memory, or why it failed. `gate` has the truth."""
    device, dtype = problem.x.device, problem.x.dtype
    results: dict[str, dict] = {name: {} for name in field}
    for kind in ("base", "lora", "dora"):
        exact, lost = attempt(lambda kind=kind: gate.truth(kind, problem), who="the truth in fp64")
        for name, contestant in field.items():
            if contestant.kind != kind:
                continue
            found, failure = (
                (None, lost) if lost else attempt(lambda c=contestant, e=exact: errors(c, problem, e), who=name)
            )
            failure = failure or gate.broken(found, dtype)
            results[name] = {"errors": found, "failed": failure}
            print(f"  {name}: {failure or 'correct'}", flush=True)
        del exact
        release()

    phases = {}
    for name, contestant in field.items():
        if results[name]["failed"]:
            continue
        entry, failure = attempt(lambda c=contestant: c.build(problem), who=name)
        if entry is None:
            results[name]["failed"] = failure
            continue
        phases[name] = entry.phases(problem)
    # The first pass of a compiled contestant compiles it.
    kept = [leaf for leaf in tree_leaves(problem) if isinstance(leaf, torch.Tensor)]
    times, failed = interleaved(phases, device, repetitions=repetitions, inspect=Outputs(kept))
    for name, run_phases in phases.items():
        if name in failed:
            results[name]["failed"] = failed[name]
            continue
        results[name]["seconds"] = {part: t._asdict() for part, t in times[name].items()}
        if profiled := profile(lambda p=run_phases: list(p()), device):
            results[name]["profile"] = profiled
        results[name]["peak_bytes"], _ = attempt(lambda p=run_phases: peak_bytes(lambda: list(p()), device), who=name)
    return results
