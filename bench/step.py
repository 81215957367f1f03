"""A real training run: loss curves of ours and of PEFT on the same data and seed, by `training`'s own loop.

The base, the data and the settings are the embedded demo's. Contestants begin from the same adapter: PEFT's,
fresh, whose A is copied into ours. Written are the losses per step, held-out losses, and seconds per step without the
first ten.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import dora_kernels as dk
from training import demo
from training.data import encode, read_splits
from training.loop import LoopSettings, train
from training.metrics import read_rows

from .contestants import patch
from .records import RESULTS, Records, stamp
from .tables import table
from .timing import attempt

COMMAND = "step"
CUTOFF = 256
RATE = 5e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of every contestant for each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=demo.THREADS, help="threads of a CPU run")
    parser.add_argument("--output", type=Path, help="results file (default: bench/results/step-<kind>.jsonl)")
    parser.add_argument("--commit", help="commit of this tree, where it is a copy without history")


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    where = stamp(torch.device(args.device), args.commit)
    records = Records(args.output or RESULTS / f"step-{where['kind'].lower()}.jsonl", where)
    for seed in args.seeds:
        case = {
            "model": "training/demo/base",
            "steps": args.steps,
            "rank": args.rank,
            "batch": args.batch,
            "seed": seed,
        }
        if records.has(COMMAND, case):
            continue
        results = {}
        for name in ("PEFT LoRA", "PEFT DoRA", "PEFT DoRA, patched", "ours"):
            results[name], failure = attempt(lambda n=name, s=seed: losses(n, args, s))
            results[name] = results[name] or {"failed": failure}
        records.add(COMMAND, case, results)
        print(f"\nseed {seed}\n{curves_table(results)}", flush=True)
    print(f"results: {records.path}")
    return 0


def losses(name: str, args: argparse.Namespace, seed: int) -> dict:
    """One run's losses and seconds."""
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    rows = read_splits(demo.DATA, seed)
    examples = {split: encode(rows[split], tokenizer, CUTOFF) for split in ("train", "validation")}
    model = adapted(name, args.rank, seed).to(args.device)
    settings = LoopSettings(
        batch_size=args.batch, max_steps=args.steps, learning_rate=RATE, seed=seed, eval_step=max(1, args.steps // 4)
    )
    ends = []
    # After each step's optimizer, before the next batch: what a user waits for.
    model.register_forward_pre_hook(lambda *_: ends.append(time.perf_counter()) if model.training else None)
    with tempfile.TemporaryDirectory() as folder:
        train(
            model, examples["train"], examples["validation"], settings, output_dir=folder,
            pad_id=tokenizer.pad_token_id, write_adapter=lambda path: None, read_adapter=lambda path: None,
        )  # fmt: skip
        logged = read_rows(Path(folder) / "metrics.jsonl")
    passed = [later - earlier for earlier, later in itertools.pairwise(ends[10:])]
    return {
        "failed": None,
        "losses": [row["loss"] for row in logged if "loss" in row],
        "held_out": [[row["step"], row["eval_loss"]] for row in logged if "eval_loss" in row],
        "step_seconds": statistics.median(passed) if passed else None,
    }


def adapted(name: str, rank: int, seed: int) -> nn.Module:
    """The demo's base with a fresh adapter whose A is the same for all."""

    def by_peft(dora: bool) -> nn.Module:
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=torch.float32)
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(base, config)

    if name != "ours":
        model = by_peft(dora=name != "PEFT LoRA")
        if name.endswith("patched"):
            patch(model)
        return model
    model = AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=torch.float32)
    model = dk.apply_dora(model, dk.DoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    theirs = by_peft(dora=True).base_model.model
    for path, layer in model.named_modules():
        if isinstance(layer, dk.DoraLinear):
            with torch.no_grad():
                layer.lora_A.copy_(theirs.get_submodule(path).lora_A["default"].weight)
    return model


def curves_table(results: dict[str, dict]) -> str:
    """Losses at the first step, a quarter, a half and the last; the largest distance from PEFT's DoRA; time."""
    reference = results["PEFT DoRA"].get("losses")
    rows = []
    for name, row in results.items():
        if row["failed"]:
            rows.append((f"{name}: {row['failed']}", *["-"] * 7))
            continue
        curve = row["losses"]
        shown = [curve[0], curve[len(curve) // 4], curve[len(curve) // 2], curve[-1]]
        distance = max(abs(a - b) / b for a, b in zip(curve, reference)) if reference else None
        rows.append(
            (
                name,
                *(f"{loss:.4f}" for loss in shown),
                f"{row['held_out'][-1][1]:.4f}",
                "-" if distance is None else f"{100 * distance:.2g}",
                "-" if row["step_seconds"] is None else f"{row['step_seconds'] * 1e3:.0f}",
            )
        )
    header = ("contestant", "first", "1/4", "1/2", "last", "held out", "max % from PEFT DoRA", "ms/step")
    return table(header, rows)
