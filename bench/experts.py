"""PREDICTS one layer's fused experts, forward and backward, for a GPU that is not here: ours, the frozen base's, PEFT's
expert LoRA.

Bytes, FLOPs, launches and peak memory are counted, every expert taken to have tokens. All kernels are limited by bytes
and FLOPs alone; the seconds are a model, and so are all ratios.
"""

import argparse
import itertools
from collections import Counter

import torch

from .contestants.experts import contestants
from .counting.gpus import ROOFS, Roofs, by_bytes_and_flops
from .counting.model_counts import seconds_by_roof
from .counting.traffic import counting, fake_module
from .measuring.shapes import EXPERTS, ExpertShape
from .measuring.timing import attempt
from .predict import MARK, NOTES, header
from .rows.compare import group_table, title


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", choices=ROOFS, required=True)
    parser.add_argument("--model", choices=EXPERTS, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 8192], help="each goes to several experts")
    parser.add_argument("--ranks", type=rank, nargs="+", default=[16], help="multiples of 8")


def rank(text: str) -> int:
    """Those that PyTorch's grouped product takes: the launches of a loop depend on the routing."""
    if int(text) < 1 or int(text) % 8:
        raise argparse.ArgumentTypeError(f"must be a multiple of 8, got {text}")
    return int(text)


def main(args: argparse.Namespace) -> int:
    print(header(args.gpu, ROOFS[args.gpu], "nothing was measured"))
    for tokens, r in itertools.product(args.tokens, args.ranks):
        shape = EXPERTS[args.model]
        case = {"model": args.model, **shape._asdict(), "tokens": tokens, "rank": r, "dtype": "bf16"}
        case["tokens an expert"] = tokens * shape.chosen / shape.experts
        print(f"\nPREDICTION, experts: {title(case)}")
        print(group_table(predict(shape, tokens, r, ROOFS[args.gpu]), mark=MARK))
    print(NOTES[by_bytes_and_flops])
    return 0


def predict(shape: ExpertShape, tokens: int, rank: int, roofs: Roofs) -> dict[str, dict]:
    """By contestant, in the form of a measured result, with how many launches there are as "block"."""
    results = {}
    for name, build in contestants(shape, rank, torch.bfloat16).items():
        row, failure = attempt(lambda build=build: count(build, shape, tokens, roofs), who=name)
        results[name] = row if row else {"failed": failure}
    return results


def count(build, shape: ExpertShape, tokens: int, roofs: Roofs) -> dict:
    """Of one contestant."""
    module = build()
    with counting(roofs.capability) as counter:
        fake_module(module)
        x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
        chosen = torch.empty(tokens, shape.chosen, dtype=torch.int64)
        weights = torch.empty(tokens, shape.chosen, dtype=torch.bfloat16)
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
