"""Times a training step (forward, backward, AdamW) of a whole model with random weights; nothing is downloaded.

Contestants share the frozen weights. One at a time has its adapters and optimizer in memory, so that peak memory is its
own; the frozen base is timed again at the end, and shows how far the machine has drifted. Memory is the peak beyond the
frozen weights: adapters, gradients, optimizer and activations. Every contestant is held to fp64 first, loss and
gradients, on two layers of the model (`gates/model.py`); one that fails is printed as failed. In the run itself it must
reproduce the base's loss and logits, of which a fresh adapter changes nothing, and keep finite parameters.
A mixture's tokens are spread evenly over its experts, and the row says how many each has.
"""

import argparse

import torch
from torch import nn

from .contestants import fused_lora
from .contestants.layer import DTYPES
from .contestants.model import Contestant, First, Trained, adapted, build_base, field_of, left_out
from .gates.layer import error
from .gates.model import Gate, worst
from .measuring.memory import peak_bytes
from .measuring.shapes import MIXTURES, QUANTISED, WHOLE, Run
from .measuring.timing import attempt, interleaved, release
from .rows.compare import group_table
from .rows.session import Session
from .rows.session import add_arguments as add_session_arguments

COMMAND = "model"
STEPS = 5  # timed for each contestant; two come before
LOSS_BAR = 0.02
"""Relative distance from the base's loss. In bf16 the loss of random weights moves by less than a percent."""
LOGITS_BAR = {torch.float32: 1e-4, torch.bfloat16: 0.125, torch.float16: 0.03}
"""Relative distance from the base's logits. In 16 bits 64 units of roundoff: each of a layer's linears is rounded anew,
which adds up as a square root does, over 32 layers to about 30 units. In fp32 sums over thousands of terms come on top.
Logits that have nothing to do with the base's are 1.4 away."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_session_arguments(parser)
    parser.add_argument("--model", choices=WHOLE, help="instead of the preset's runs: this model, with the flags below")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers (default: the model's own number)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward")
    parser.add_argument("--quantize", choices=QUANTISED, default="", help="format of the base's linear layers")


def main(args: argparse.Namespace) -> int:
    if args.quantize and args.model in MIXTURES:
        print(f"--quantize {args.quantize} does not go with --model {args.model}: its experts stay in 16 bits")
        return 2
    session = Session(args)
    flags = (args.layers, args.batch, args.sequence, args.rank, args.checkpointing, args.quantize)
    run(session, (Run(args.model, *flags),) if args.model else None)
    return session.finish()


def run(session: Session, runs: tuple[Run, ...] | None = None) -> None:
    """Measures every run of the session's preset, or those given."""
    built: list[tuple[tuple, nn.Module]] = []  # one model at a time; runs that share it stand in a row
    for run in session.preset.runs if runs is None else runs:
        case = run.case(session.preset.dtype, session.preset.compiled)
        if session.skips(COMMAND, case):
            continue

        def measured(run=run):
            key = (run.model, run.layers, run.quantize)
            if not built or built[0][0] != key:
                built.clear()
                release()
                built.append((key, build_base(run, DTYPES[session.preset.dtype], session.device)))
            return measure(built[0][1], run, session)

        if results := session.measure(COMMAND, case, measured):
            print(group_table(results, tokens=run.batch * run.sequence), flush=True)


def measure(base: nn.Module, run: Run, session: Session) -> dict[str, dict]:
    """By contestant: its loss, times and peak memory, or why it failed."""
    generator = torch.Generator(session.device).manual_seed(0)
    ids = torch.randint(run.sizes.vocab_size, (run.batch, run.sequence), generator=generator, device=session.device)
    libraries, remarks = ([], []) if run.is_mixture else (fused_lora.installed(), fused_lora.remarks())
    field = field_of(run, DTYPES[session.preset.dtype], libraries=libraries)
    missing = {name: reason for name, reason in left_out(session.device).items() if name in field}
    remarks += (f"{name}: left out; {reason}" for name, reason in missing.items())
    print("\n".join(f"  {line}" for line in remarks))
    field = {name: contestant for name, contestant in field.items() if name not in missing}
    results = hold_to_fp64(field, run, session)
    expected = None  # the frozen base is the first
    for name, contestant in field.items():
        if not results[name]["failed"]:
            found, failure = attempt(
                lambda c=contestant, e=expected: one(base, c, ids, e, run.checkpointing, session), who=name
            )
            result, first = found or ({"failed": failure}, None)
            results[name] |= result
            expected = expected or first
        print(f"  {name}: {results[name]['failed'] or 'done'}", flush=True)
        release()
    return results


def hold_to_fp64(field: dict[str, Contestant], run: Run, session: Session) -> dict[str, dict]:
    """By contestant: its errors, and why it is not to be timed."""
    dtype = DTYPES[session.preset.dtype]
    gate, lost = attempt(
        lambda: Gate(run, dtype, session.device, compiled=session.preset.compiled), who="the truth in fp64"
    )
    results = {}
    for name, contestant in field.items():
        errors, failure = (None, lost) if lost else attempt(lambda c=contestant: gate.errors(c), who=name)
        failure = failure or gate.broken(errors)
        results[name] = {"errors": worst(errors) if errors else None, "failed": failure}
        release()
    return results


def one(base: nn.Module, contestant: Contestant, ids, expected: First | None, checkpointing, session: Session):
    """One contestant's result, and its first step's loss and logits."""
    built: list[Trained] = []

    def build_and_warm_up():
        model = adapted(base, contestant.adapt, checkpointing)
        built.append(Trained(torch.compile(model) if session.preset.compiled else model, ids, contestant.autocast))
        for _ in range(2):
            list(built[0].step())

    peak = peak_bytes(build_and_warm_up, session.device)
    (trained,) = built
    found = trained.first
    result = {"failed": wrong(trained, expected, DTYPES[session.preset.dtype]), "loss": found.loss.item()}
    result["frozen_bytes"] = sum(parameter.nbytes for parameter in base.parameters())
    if result["failed"]:
        return result, found
    steps = min(STEPS, session.repetitions)
    times, failed = interleaved({"step": trained.step}, session.device, repetitions=steps, warmup=0)
    if failed:
        return result | {"failed": failed["step"]}, found
    if not all(p.isfinite().all() for p in trained.parameters):
        return result | {"failed": "wrong: a timed step made a parameter infinite or NaN"}, found
    seconds = {part: t._asdict() for part, t in times["step"].items()}
    return result | {"peak_bytes": peak, "seconds": seconds}, found


def wrong(trained: Trained, expected: First | None, dtype: torch.dtype) -> str | None:
    """What the run itself shows to be wrong, or None; `expected` is the base's first step."""
    if expected is not None:
        loss, base_loss = trained.first.loss.item(), expected.loss.item()
        # Not `>`: NaN is a failure.
        if not abs(loss - base_loss) <= LOSS_BAR * base_loss:
            return f"wrong: loss {loss:.4f}, the base's is {base_loss:.4f}"
        distance = error(trained.first.logits, expected.logits.double())
        if not distance <= LOGITS_BAR[dtype]:
            return f"wrong: logits {distance:.1e} from the base's, allowed {LOGITS_BAR[dtype]:.1e}"
    if not all(p.isfinite().all() for p in trained.parameters):
        return "wrong: a step made a parameter infinite or NaN"
    return None
