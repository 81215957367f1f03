"""Times a gated MLP alone, and an attention's q, k and v, forward and backward.

Ours, together and layer by layer, stand against the frozen base, also with a fused GLU, PEFT's LoRA and PEFT's DoRA,
and Axolotl's and Unsloth's LoRA where they are installed.

Every contestant has the same parameters and is held to fp64 first, for the very shape that is timed; one that fails is
printed as failed. Time and memory are those of `layer`. Saved is what autograd keeps from the forward to the backward,
beyond parameters and the input.
"""

import argparse

import torch
from torch.utils._pytree import tree_leaves

from . import layer
from .contestants import fused_lora
from .contestants.block import BlockProblem, contestants, left_out, make_problem
from .contestants.layer import DTYPES, Contestant
from .gates import block as block_gate
from .measuring.memory import saved_bytes
from .measuring.timing import attempt, release
from .rows.compare import group_table
from .rows.session import Session
from .rows.session import add_arguments as add_session_arguments

COMMAND = "block"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_arguments(parser)


def main(args: argparse.Namespace) -> int:
    session = Session(args)
    run(session)
    return session.finish()


def run(session: Session) -> None:
    """Measures every case of the session's preset."""
    preset, device = session.preset, session.device
    print("\n".join([*left_out(device), *fused_lora.remarks()]))
    libraries = fused_lora.installed()
    dtype = DTYPES[preset.dtype]
    for case, shape, *sizes in preset.blocks():
        if session.skips(COMMAND, case):
            continue

        def measured(shape=shape, sizes=sizes):
            problem = make_problem(shape, *sizes, dtype, device)
            field = contestants(shape.name, dtype, device, compiled=preset.compiled, libraries=libraries)
            return measure(problem, field, session.repetitions)

        if results := session.measure(COMMAND, case, measured):
            print(group_table(results), flush=True)


def measure(problem: BlockProblem, field: dict[str, Contestant], repetitions: int) -> dict[str, dict]:
    """By contestant: its error against fp64, its times, peak memory and what it saves, or why it failed."""
    results = layer.measure(problem, field, repetitions, block_gate)
    for name, contestant in field.items():
        if not results[name]["failed"]:
            results[name]["saved_bytes"], _ = attempt(lambda c=contestant: saved_by(c, problem), who=name)
            release()
    return results


def saved_by(contestant: Contestant, problem: BlockProblem) -> int:
    """Bytes."""
    entry = contestant.build(problem)
    kept = [leaf for leaf in tree_leaves(problem) if isinstance(leaf, torch.Tensor)]
    return saved_bytes(lambda: entry.forward(problem.x), [*kept, *entry.module.parameters()])
