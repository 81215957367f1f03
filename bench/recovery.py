"""Train what you serve: what `merge_aware` recovers of a fine-tune that is merged back into a quantised base.

The embedded demo's base is rounded to each format, and trained on twice by `training`'s own loop, with the same data,
seed and steps. One run trains as ever, and its W' is requantised afterwards, as export does. The other one multiplies
with the requantised W' in every step. Losses are of the held-out rows, in nats per token. What is recovered is the
share of the unmerged adapter's gain over the base that is left in the format.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import dora_kernels as dk
from dora_kernels.models.modules import dora_layers
from dora_kernels.ops.base_weights import keep_packing

from .contestants.model import in_nf4
from .installation import training
from .rows.records import stamp
from .rows.tables import table

demo, batches, loop, evaluate = map(training, ("demo", "minimal.batches", "minimal.loop", "minimal.evaluate"))
quantised_linear = training("quantised_linear")

FORMATS = ("nf4", "int4", "fp8", "nvfp4")
CUTOFF, EVALUATION_BATCH = 256, 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--formats", choices=FORMATS, nargs="+", default=list(FORMATS))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1e-4], help="peak learning rates")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there what is printed")


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(demo.THREADS)
    where = stamp(torch.device("cpu"), None)
    lines = [
        f"The demo's base, rank {args.rank}, {args.steps} steps of {args.batch} rows, seeds "
        f"{', '.join(map(str, args.seeds))}; fp32 on a CPU, torch {where['torch']}"
    ]
    print(lines[0], flush=True)
    rows = []
    for name in args.formats:
        for rate in args.rates:
            runs = [losses(name, rate, seed, args) for seed in args.seeds]
            mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
            gain = mean["base"] - mean["unmerged"]
            shares = [f"{(mean['base'] - mean[key]) / gain:.0%}" for key in ("requantised", "merge_aware")]
            cells = [f"{mean[key]:.4f}" for key in ("base", "unmerged", "requantised", "merge_aware")]
            rows.append([name, f"{rate:g}", *cells, *shares])
            print(*rows[-1], flush=True)
    heads = [
        "format",
        "rate",
        "base",
        "unmerged",
        "requantised",
        "merge_aware",
        "kept by requantising",
        "by merge_aware",
    ]
    lines.append(table(heads, rows))
    print(lines[-1])
    if args.output:
        args.output.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return 0


def losses(name: str, rate: float, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Held-out losses of the base, of the unmerged adapter, of its requantised merge, and of the merge-aware run's."""
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    rows = batches.read_splits(demo.DATA)
    examples = {split: batches.encode(rows[split], tokenizer, CUTOFF) for split in ("train", "validation")}

    def held_out(model: nn.Module) -> float:
        return evaluate.held_out_loss(model, examples["validation"], EVALUATION_BATCH, tokenizer.pad_token_id)

    def trained(merge_aware: bool) -> nn.Module:
        torch.manual_seed(seed)
        config = dk.DoraConfig(r=args.rank, lora_alpha=2 * args.rank, merge_aware=merge_aware)
        model = dk.apply_dora(base(name), config)
        settings = loop.LoopSettings(batch_size=args.batch, max_steps=args.steps, learning_rate=rate, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            loop.train(
                model, examples["train"], [], settings, output_dir=folder, pad_id=tokenizer.pad_token_id,
                write_adapter=lambda path: None, read_adapter=lambda path: None,
            )  # fmt: skip
        return model

    found = {"base": held_out(base(name))}
    model = trained(merge_aware=False)
    found["unmerged"] = held_out(model)
    for layer in dora_layers(model).values():
        layer.merge_aware = True  # the very product of the exported checkpoint
    found["requantised"] = held_out(model)
    return found | {"merge_aware": held_out(trained(merge_aware=True))}


def base(name: str) -> nn.Module:
    """The demo's base in fp32, its decoder's linear layers in a format."""
    model = AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=torch.float32)
    for path, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            layer = in_nf4(linear, torch.float32) if name == "nf4" else quantised_linear.quantised_linear(linear, name)
            model.model.set_submodule(path, layer)
    keep_packing(model)
    return model
