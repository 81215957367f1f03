"""A real training run: loss curves of ours and of PEFT on the same data and seed, by `training`'s own loop.

The base, the data and the settings are the embedded demo's. Contestants begin from the same adapter: the A that PEFT
draws for an fp32 base. Written are the losses per step, held-out losses, the size of the update, and seconds per step
without the first ten.

With `--dtype bf16` the base is in bf16 and all run under autocast, as Trainer does; the reference is PEFT's DoRA in
fp32 on the same base weights, rounded to bf16. Adapters are fp32, but for one contestant.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import dora_kernels as dk

from .contestants.layer import DTYPES, patch
from .installation import LOCAL, training
from .measuring.timing import attempt
from .rows import records as stored
from .rows.records import Records, stamp
from .rows.tables import table

demo, batches, loop = map(training, ("demo", "minimal.batches", "minimal.loop"))

COMMAND = "step"
CUTOFF = 256
RATE = 5e-3
FP32_BASE = "PEFT DoRA, fp32 base"
CONTESTANTS = {
    "fp32": ("PEFT LoRA", "PEFT DoRA", "PEFT DoRA, patched", "ours"),
    "bf16": (
        FP32_BASE,
        "PEFT DoRA",
        "PEFT DoRA, bf16 A and B",
        "ours, weight space",
        "ours, weight space, nearest",
        "ours, token space",
        "ours, token space, nearest",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=RATE, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--dtype", choices=CONTESTANTS, default="fp32", help="of the frozen base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of every contestant for each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=demo.THREADS, help="threads of a CPU run")
    parser.add_argument("--output", type=Path, help="results file (default: out/bench/step-<kind>.jsonl)")
    parser.add_argument("--commit", help="commit of this tree, where it is a copy without history")


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    where = stamp(torch.device(args.device), args.commit)
    records = Records(args.output or LOCAL / f"step-{where['kind'].lower()}.jsonl", where)
    cases = [
        {
            "model": "training/demo/base",
            "dtype": args.dtype,
            "steps": args.steps,
            "rank": args.rank,
            "batch": args.batch,
            "rate": args.rate,
            "seed": seed,
        }
        for seed in args.seeds
    ]
    for seed, case in zip(args.seeds, cases):
        if records.has(COMMAND, case):
            continue
        results = {}
        for name in CONTESTANTS[args.dtype]:
            results[name], failure = attempt(lambda n=name, s=seed: losses(n, args, s))
            results[name] = results[name] or {"failed": failure}
        records.add(COMMAND, case, results)
        print(f"\nseed {seed}\n{curves_table(results)}", flush=True)
    here = {name: where[name] for name in ("kind", "device", "threads")}
    rows = [row for row in stored.read_rows([records.path]) if row["case"] in cases]
    runs = stored.groups(row for row in rows if here.items() <= row["stamp"].items())
    print(f"\n{len(runs)} seeds\n{summary_table(runs)}\nresults: {records.path}")
    return 0


def losses(name: str, args: argparse.Namespace, seed: int) -> dict:
    """One run's losses and seconds."""
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    rows = batches.read_splits(demo.DATA)
    examples = {split: batches.encode(rows[split], tokenizer, CUTOFF) for split in ("train", "validation")}
    model = adapted(name, args.dtype, args.rank, seed).to(args.device)
    if args.dtype == "bf16" and name != FP32_BASE:
        model.forward = torch.autocast(torch.device(args.device).type, torch.bfloat16)(model.forward)
    settings = loop.LoopSettings(
        batch_size=args.batch, max_steps=args.steps, learning_rate=args.rate, seed=seed,
        eval_step=max(1, args.steps // 4),
    )  # fmt: skip
    ends = []
    # After each step's optimizer, before the next batch: what a user waits for.
    model.register_forward_pre_hook(lambda *_: ends.append(time.perf_counter()) if model.training else None)
    with tempfile.TemporaryDirectory() as folder:
        loop.train(
            model, examples["train"], examples["validation"], settings, output_dir=folder,
            pad_id=tokenizer.pad_token_id, write_adapter=lambda path: None, read_adapter=lambda path: None,
        )  # fmt: skip
        logged = training("checkpoints.metrics").read_rows(Path(folder) / "metrics.jsonl")
    passed = [later - earlier for earlier, later in itertools.pairwise(ends[10:])]
    return {
        "failed": None,
        "losses": [row["loss"] for row in logged if "loss" in row],
        "held_out": [[row["step"], row["eval_loss"]] for row in logged if "eval_loss" in row],
        "update": update(model),
        "step_seconds": statistics.median(passed) if passed else None,
    }


def adapted(name: str, dtype: str, rank: int, seed: int) -> nn.Module:
    """The demo's base with a fresh adapter whose A is the same for all."""
    options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}

    def base(dtype: torch.dtype) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=dtype)

    def by_peft(base: nn.Module, dora: bool = True, **kept) -> nn.Module:
        config = peft.LoraConfig(**options, use_dora=dora, task_type="CAUSAL_LM")
        return peft.get_peft_model(base, config, **kept)

    torch.manual_seed(seed)
    # On a bf16 base PEFT would round the A that it draws.
    first = dict(adapters(by_peft(base(torch.float32))))
    frozen = base(DTYPES[dtype])
    if name.startswith("ours"):
        space = next((space for space in ("token", "weight") if f"{space} space" in name), "auto")
        rounding = "nearest" if name.endswith("nearest") else "dithered"
        model = dk.apply_dora(frozen, dk.DoraConfig(**options, space=space, rounding=rounding))
    elif name == "PEFT DoRA, bf16 A and B":
        model = by_peft(frozen, autocast_adapter_dtype=False)
        for key, parameter in model.named_parameters():
            if "magnitude" in key:
                # PEFT's would be bf16, which `training` refuses: of a magnitude near 1 no step would be left.
                parameter.data = parameter.data.float()
    else:
        model = by_peft(frozen.float() if name == FP32_BASE else frozen, dora=name != "PEFT LoRA")
        if name.endswith("patched"):
            patch(model)
    for path, (_, lora_A, _) in adapters(model):
        with torch.no_grad():
            lora_A.copy_(first[path][1])
    return model


def adapters(model: nn.Module) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    """W [N, K], A [R, K] and B [N, R] of every adapted layer, ours or PEFT's, by its path in the base."""
    for path, layer in model.named_modules():
        path = path.removeprefix("base_model.model.")
        if isinstance(layer, dk.DoraLinear):
            yield path, (layer.weight, layer.lora_A, layer.lora_B)
        elif isinstance(layer, peft.tuners.lora.LoraLayer):
            yield path, (layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)


@torch.no_grad()
def update(model: nn.Module) -> float:
    """‖s B A‖ / ‖W‖, Frobenius, over all adapted layers together; s is 2."""
    layers = [[tensor.float() for tensor in found] for _, found in adapters(model)]
    squares = sum((2 * B @ A).square().sum().item() for _, A, B in layers)
    return math.sqrt(squares / sum(W.square().sum().item() for W, _, _ in layers))


def reference_of(results: dict[str, dict]) -> str:
    """The contestant from which the others' distance is shown."""
    return FP32_BASE if FP32_BASE in results else "PEFT DoRA"


def distances(results: dict[str, dict], name: str) -> list[float]:
    """|loss - reference| / reference at every step; none where one of both failed."""
    reference = results[reference_of(results)].get("losses") or []
    return [abs(a - b) / b for a, b in zip(results[name].get("losses") or [], reference)]


def late(curve: list[float]) -> float | None:
    """The mean over the last half of the steps: one step's noise says little, and all begin alike."""
    return statistics.mean(curve[len(curve) // 2 :]) if curve else None


def curves_table(results: dict[str, dict]) -> str:
    """Losses at the first step, a quarter, a half and the last; held out; the distance from the reference; time."""
    rows = []
    for name, row in results.items():
        if row["failed"]:
            rows.append((f"{name}: {row['failed']}", *["-"] * 9))
            continue
        curve, distance = row["losses"], distances(results, name)
        shown = [curve[0], curve[len(curve) // 4], curve[len(curve) // 2], curve[-1], row["held_out"][-1][1]]
        rows.append(
            (
                name,
                *(f"{loss:.4f}" for loss in shown),
                f"{100 * late(distance):.2g}" if distance else "-",
                f"{100 * max(distance):.2g}" if distance else "-",
                f"{100 * row['update']:.2g}" if row.get("update") is not None else "-",
                "-" if row["step_seconds"] is None else f"{row['step_seconds'] * 1e3:.0f}",
            )
        )
    reference = reference_of(results)
    header = (
        "contestant", "first", "1/4", "1/2", "last", "held out",
        f"mean % from {reference}, last half", f"max % from {reference}", "‖sBA‖ / ‖W‖, %", "ms/step",
    )  # fmt: skip
    return table(header, rows)


def summary_table(runs: list[dict[str, dict]]) -> str:
    """Over the runs, one per seed: held-out loss, what it is above the reference's of the same seed, and the curve's
    distance. "±" is the standard deviation over seeds."""

    def cell(values: list[float | None], digits: int) -> str:
        values = [value for value in values if value is not None]
        if not values:
            return "-"
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    def held_out(run: dict[str, dict], name: str) -> float | None:
        return run[name]["held_out"][-1][1] if run[name].get("held_out") else None

    def above(run: dict[str, dict], name: str) -> float | None:
        mine, reference = held_out(run, name), held_out(run, reference_of(run))
        return None if mine is None or reference is None else 100 * (mine / reference - 1)

    rows = []
    for name in runs[0]:
        distance = [late(distances(run, name)) for run in runs]
        rows.append(
            (
                name,
                cell([held_out(run, name) for run in runs], 4),
                cell([above(run, name) for run in runs], 2),
                cell([None if value is None else 100 * value for value in distance], 3),
                f"{sum(bool(run[name].get('losses')) for run in runs)}",
            )
        )
    reference = reference_of(runs[0])
    header = (
        "contestant", "held out", f"held out, % above {reference}", f"mean % from {reference}, last half", "seeds",
    )  # fmt: skip
    return table(header, rows)
