"""Times the choices that the engine's design rests on, each against its alternative, on the GPU at hand.

Token against weight space, whose break-even `dispatch` predicts. The norm, alone and with the merge, with an output
feature's inputs in one part and in several. What `addmm_` with beta = 1 costs. dx as one GEMM, with A in the tail of
W's buffer, against two. A CUDA graph of a layer against its launches one by one. PEFT's norm by an identity matrix
against its whole layer. Calls are interleaved and start from a cold L2 cache. On a CPU there are neither launches nor
graphs: those two questions are left out.
"""

import argparse
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dora_kernels.ops import kernels

from .contestants.layer import ALPHA_OVER_RANK, DTYPES, Problem, contestants, make_problem
from .counting.operations import ROUNDED
from .measuring.timing import interleaved
from .rows.compare import seconds
from .rows.session import Session
from .rows.session import add_arguments as add_session_arguments
from .rows.tables import milliseconds, ratio, table
from .tune import configured

COMMAND = "questions"
PADDING = 64  # of the rank, so that the longer GEMM's rows stay aligned
Calls = dict[str, Callable[[], object]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_arguments(parser)


def main(args: argparse.Namespace) -> int:
    session = Session(args)
    run(session)
    return session.finish()


def run(session: Session, names: Collection[str] | None = None) -> None:
    """Asks every question, or those named, of every case of the session's preset."""
    dtype = DTYPES[session.preset.dtype]
    for case, *sizes in session.preset.layers():
        for name, question in QUESTIONS.items():
            if names is not None and name not in names:
                continue
            asked = {"question": name} | case
            if (question.on_a_gpu and session.device.type != "cuda") or session.skips(COMMAND, asked):
                continue
            results = session.measure(
                COMMAND, asked, lambda s=sizes, q=question: measure(q, make_problem(*s, dtype, session.device), session)
            )
            if results:
                print(answers(results), flush=True)


class Question(NamedTuple):
    """The ways that are compared; `head_start` as in `timing.interleaved`."""

    calls: Callable[[Problem], Calls]
    on_a_gpu: bool = False
    head_start: bool = True


def measure(question: Question, problem: Problem, session: Session) -> dict[str, dict]:
    """By way: its time, or why it failed."""

    def whole(call):
        def phases():
            call()
            yield "call"

        return phases

    phases = {name: whole(call) for name, call in question.calls(problem).items()}
    times, failed = interleaved(phases, session.device, repetitions=session.repetitions, head_start=question.head_start)
    return {
        name: {
            "failed": failed.get(name),
            "seconds": {part: t._asdict() for part, t in times[name].items()} if name in times else {},
        }
        for name in phases
    }


def answers(results: dict[str, dict]) -> str:
    """Every way, and its ratio to the first."""
    first = seconds(next(iter(results.values())))
    rows = [
        (name, milliseconds(time), ratio(time, first))
        if (time := seconds(row))
        else (f"{name}: {row['failed']}", "-", "-")
        for name, row in results.items()
    ]
    return table(("way", "ms", "× the first"), rows)


def parts_of_the_norm(problem: Problem) -> Calls:
    """Where programs share an output feature, the norm alone takes one launch more, and the merge adds up itself."""
    factors = (problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, ALPHA_OVER_RANK)

    def way(merged: bool, splits: int):
        def call():
            with configured("weight_norm_config", {"splits": splits}):
                if merged:
                    return kernels.merge(*factors, dtype=problem.x.dtype, **ROUNDED)[1]
                return kernels.weight_norm(*factors)[0]

        return call

    return {
        f"norm{' and merge' if merged else ''} in {splits}": way(merged, splits)
        for merged in (False, True)
        for splits in (1, 2, 4)
    }


def beta(problem: Problem) -> Calls:
    """dx += dZ W, against dx = dZ W."""
    into = torch.zeros_like(problem.x.detach())
    weight = problem.weight.detach()
    return {
        "mm": lambda: torch.mm(problem.grad_y, weight, out=into),
        "addmm_, beta = 1": lambda: into.addmm_(problem.grad_y, weight),
    }


def longer_gemm(problem: Problem) -> Calls:
    """dx = dh A + dZ W: two GEMMs, or one over N + R columns of [dZ, dh] and rows of [W; A]."""
    padded = -(-problem.rank // PADDING) * PADDING - problem.rank
    weight, lora_A = problem.weight.detach(), problem.lora_A.to(problem.x.dtype)
    grad_h = torch.randn_like(problem.x[:, :1]).detach().repeat(1, problem.rank) / problem.rank
    left = torch.cat([problem.grad_y, F.pad(grad_h, (0, padded))], dim=1)
    right = torch.cat([weight, F.pad(lora_A, (0, 0, 0, padded))])
    return {
        "two GEMMs": lambda: (grad_h @ lora_A).addmm_(problem.grad_y, weight),
        "one GEMM, A in W's tail": lambda: left @ right,
    }


def graph(problem: Problem) -> Calls:
    """A layer's forward and backward, launched one by one, and as a captured graph."""
    phases = contestants(problem.x.dtype, problem.x.device)["ours fp32, auto"].build(problem).phases(problem)

    def eager():
        for _ in phases():
            pass

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        eager()
    return {"launched one by one": eager, "captured graph": captured.replay}


def identity_norm(problem: Problem) -> Calls:
    """PEFT's DoRA forward and backward, and of it the product through an identity matrix, and all of the norm."""
    found = {}
    for name, contestant in contestants(problem.x.dtype, problem.x.device).items():
        if not name.startswith("PEFT DoRA") or name.endswith("patched"):
            continue
        entry = contestant.build(problem)
        layer = entry.module.linear
        dora, A, B = layer.lora_magnitude_vector["default"], layer.lora_A["default"], layer.lora_B["default"]
        on = nullcontext() if entry.autocast is None else torch.autocast(problem.x.device.type, entry.autocast)

        def product(dora=dora, A=A, B=B, on=on):
            with on:
                return dora.get_lora_weight(lora_A=A, lora_B=B)

        def norm(dora=dora, product=product, on=on):
            product = product().to(problem.x.dtype)
            with on:
                return dora.get_weight_norm(problem.weight, product.detach(), ALPHA_OVER_RANK)

        phases = entry.phases(problem)
        found[f"{name}: forward and backward"] = lambda phases=phases: list(phases())
        found[f"{name}: B·A through an identity matrix"] = product
        found[f"{name}: B·A and the norm"] = norm
    return found


def token_or_weight(problem: Problem) -> Calls:
    """A layer's forward and backward in each form, and the frozen base's, which is in both."""
    field = contestants(problem.x.dtype, problem.x.device, reference=False)
    kinds = ("frozen base", "ours fp32, token", "ours fp32, weight")
    chosen = {kind: entry for kind in kinds for name, entry in field.items() if name.startswith(kind)}
    entries = {kind: entry.build(problem).phases(problem) for kind, entry in chosen.items()}
    return {kind: lambda phases=phases: list(phases()) for kind, phases in entries.items()}


FORMS = "token or weight space"
QUESTIONS = {
    FORMS: Question(token_or_weight),
    "the norm in parts": Question(parts_of_the_norm, on_a_gpu=True),
    "addmm_ with beta = 1": Question(beta),
    "dx in one GEMM": Question(longer_gemm),
    # What a graph saves is the time of the CPU: without a head start it shows.
    "a CUDA graph": Question(graph, on_a_gpu=True, head_start=False),
    "PEFT's identity matrix": Question(identity_norm),
}
