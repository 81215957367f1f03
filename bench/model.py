"""Times a training step (forward, backward, AdamW) of a whole model with random weights; nothing is downloaded.

Contestants share the frozen weights. One at a time has its adapters and optimizer in memory, so that peak memory is its
own; the frozen base is timed again at the end, and shows how far the machine has drifted. Memory is the peak beyond the
frozen weights: adapters, gradients, optimizer and activations. Every contestant is held to fp64 first, loss and
gradients, on two layers of the model (`model_gate.py`); one that fails is printed as failed. In the run itself it must
reproduce the base's loss, of which a fresh adapter changes nothing, and keep finite parameters.
"""

import argparse

import torch
from torch import nn

from .compare import group_table, title
from .contestants import DTYPES
from .memory import peak_bytes
from .model_field import Contestant, Trained, adapted, build_base, contestants
from .model_gate import Gate, worst
from .session import Session
from .session import add_arguments as add_session_arguments
from .shapes import MODELS, Run
from .timing import attempt, interleaved, release

COMMAND = "model"
STEPS = 5  # timed for each contestant; two come before
LOSS_BAR = 0.02
"""Relative distance from the base's loss. In bf16 the loss of random weights moves by less than a percent."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_arguments(parser)
    parser.add_argument(
        "--model", choices=MODELS, help="instead of the preset's runs: this model, with the flags below"
    )
    parser.add_argument("--layers", type=int, default=0, help="decoder layers (default: the model's own number)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward")
    parser.add_argument("--quantize", choices=["nf4"], default="", help="4-bit base weights, by bitsandbytes")


def main(args: argparse.Namespace) -> int:
    session = Session(args)
    flags = (args.layers, args.batch, args.sequence, args.rank, args.checkpointing, args.quantize)
    run(session, (Run(args.model, *flags),) if args.model else None)
    return session.finish()


def run(session: Session, runs: tuple[Run, ...] | None = None) -> None:
    """Measures every run of the session's preset, or those given."""
    built: tuple[tuple, nn.Module] | None = None
    for run in session.preset.runs if runs is None else runs:
        case = run._asdict() | {"dtype": session.preset.dtype, "compiled": session.preset.compiled}
        if session.skips(COMMAND, case):
            continue
        print(f"\n{title(case)}", flush=True)
        key = (run.model, run.layers, run.quantize)
        if built is None or built[0] != key:
            built = None
            release()
            base, failure = attempt(lambda r=run: build_base(r, DTYPES[session.preset.dtype], session.device))
            if failure:
                print(f"the model itself failed: {failure}", flush=True)
                continue
            built = (key, base)
        results = measure(built[1], run, session)
        session.records.add(COMMAND, case, results)
        print(group_table(results, tokens=run.batch * run.sequence), flush=True)


def measure(base: nn.Module, run: Run, session: Session) -> dict[str, dict]:
    """By contestant: its loss, times and peak memory, or why it failed."""
    generator = torch.Generator(session.device).manual_seed(0)
    vocabulary = MODELS[run.model].vocab_size
    ids = torch.randint(vocabulary, (run.batch, run.sequence), generator=generator, device=session.device)
    results = hold_to_fp64(run, session)
    for name, contestant in contestants(DTYPES[session.preset.dtype], run.rank).items():
        if not results[name]["failed"]:
            expected = results["frozen base"].get("loss")
            found, failure = attempt(lambda c=contestant, e=expected: one(base, c, ids, e, run.checkpointing, session))
            results[name] |= found or {"failed": failure}
        print(f"  {name}: {results[name]['failed'] or 'done'}", flush=True)
        release()
    return results


def hold_to_fp64(run: Run, session: Session) -> dict[str, dict]:
    """By contestant: its errors, and why it is not to be timed."""
    dtype = DTYPES[session.preset.dtype]
    gate, lost = attempt(lambda: Gate(run, dtype, session.device, compiled=session.preset.compiled))
    results = {}
    for name, contestant in contestants(dtype, run.rank).items():
        errors, failure = (None, lost) if lost else attempt(lambda c=contestant: gate.errors(c))
        failure = failure or gate.broken(errors)
        results[name] = {"errors": worst(errors) if errors else None, "failed": failure}
        release()
    return results


def one(base: nn.Module, contestant: Contestant, ids, expected, checkpointing, session: Session) -> dict:
    """One contestant's result."""
    built: list[Trained] = []

    def build_and_warm_up():
        model = adapted(base, contestant.adapt, checkpointing)
        built.append(Trained(torch.compile(model) if session.preset.compiled else model, ids, contestant.autocast))
        for _ in range(2):
            list(built[0].step())

    peak = peak_bytes(build_and_warm_up, session.device)
    (trained,) = built
    loss = trained.first_loss.item()
    if expected is not None and not abs(loss - expected) <= LOSS_BAR * expected:
        return {"failed": f"wrong: loss {loss:.4f}, the base's is {expected:.4f}", "loss": loss}
    if not all(p.isfinite().all() for p in trained.parameters):
        return {"failed": "wrong: a step made a parameter infinite or NaN", "loss": loss}
    steps = min(STEPS, session.repetitions)
    times, failed = interleaved({"step": trained.step}, session.device, repetitions=steps, warmup=0)
    if failed:
        return {"failed": failed["step"], "loss": loss}
    seconds = {part: t._asdict() for part, t in times["step"].items()}
    return {"failed": None, "loss": loss, "peak_bytes": peak, "seconds": seconds}
